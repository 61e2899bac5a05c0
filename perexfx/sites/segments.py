"""Segments: the parts of a graph that can be run a second time by themselves.

Promises: gradients enter a segment through one value and leave it through one, so that its second backward needs
nothing of what lies above it; whatever else it reads is named. A segment that might not compute the same again is
refused, with the reason. They follow each other from the beginning of the graph, and each has a site; what comes after
the last value that carries all gradients is in none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from perexfx.analysis import Analysis
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost, Work
from perexfx.ir.layout import Layout
from perexfx.ir.ordinary_gradient import ordinary_gradient
from perexfx.ir.rule import Fitted
from perexfx.ir.site import Site
from perexfx.sites.classify import passes_no_gradient
from perexfx.sites.regions import convolution_work


@dataclass(frozen=True)
class Segment:
    """A part of a graph, from one value through which all gradients pass to the next.

    Attributes:
        nodes: Names of its nodes, in graph order.
        entry: The value through which gradients leave it; "" where it begins with the graph.
        exit: The value through which they enter it.
        given: The values from outside that its nodes read, but for those that come from the clip node.
        sites: Names of its sites.
        modules: Paths of the modules that its nodes call.
        layout_of_exit: Where that carries examples; known with an analysis.
        refusal: Why it cannot be run a second time; "" where it can.
        cost: Of a second forward and its input gradients.
        is_bridge: Whether all of its sites have small gradients at hand: it is run again with those around it.
    """

    nodes: tuple[str, ...]
    entry: str
    exit: str
    given: tuple[str, ...]
    sites: tuple[str, ...]
    modules: tuple[str, ...] = ()
    layout_of_exit: Layout = field(default_factory=lambda: Layout(0))
    refusal: str = ""
    cost: Cost = field(default_factory=lambda: Cost((), 0))
    is_bridge: bool = False


def segments_of(graph: fx.Graph, sites: Sequence[Site]) -> tuple[Segment, ...]:
    """The segments of a captured graph.

    Args:
        graph: In functional form.
        sites: In graph order.
    """
    clipped = {name for site in sites for name in site.parameters}
    nodes = list(graph.nodes)
    order = {node: at for at, node in enumerate(nodes)}
    at_sites = {site.node: site.name for site in sites}
    cuts = _cuts(nodes, order, at_sites)
    found, begin, entry = [], 0, ""
    for cut in cuts:
        end = order[cut] + 1
        inside = [node for node in nodes[begin:end] if node.op not in ("placeholder", "get_attr")]
        found.append(_segment(inside, entry, cut, at_sites, clipped))
        begin, entry = end, cut.name
    return tuple(found)


def _cuts(nodes: Sequence[fx.Node], order: Mapping[fx.Node, int], at_sites: Mapping[str, str]) -> list[fx.Node]:
    """The values that everything a gradient passes through depends on: the last of them before each site, and the one
    that is returned.
    """
    carrying: set[fx.Node] = set()
    live: set[fx.Node] = set()
    cuts: list[fx.Node] = []
    has_site = False
    for node in nodes:
        if node.name in at_sites or (carrying.intersection(node.all_input_nodes) and not passes_no_gradient(node)):
            carrying.add(node)
            live.add(node)
        live = {value for value in live if _last_reader(value, order) > order[node]}
        has_site = has_site or node.name in at_sites
        if live != {node} or _may_be_several(node):
            continue
        if has_site:
            cuts.append(node)
        else:
            cuts[-1] = node  # the later one: what the next site reads
        has_site = False
    return cuts


def _may_be_several(node: fx.Node) -> bool:
    """Whether a node's value may be several tensors, or an object around them."""
    return isinstance(node.target, type) or all(user.target is operator.getitem for user in node.users)


def _last_reader(node: fx.Node, order: Mapping[fx.Node, int]) -> int:
    """Of those that may send a gradient back."""
    return max((order[user] for user in node.users if not passes_no_gradient(user)), default=-1)


def _segment(
    inside: Sequence[fx.Node], entry: str, cut: fx.Node, at_sites: Mapping[str, str], clipped: Collection[str]
) -> Segment:
    own = set(inside)
    read = dict.fromkeys(value for node in inside for value in node.all_input_nodes if value not in own)
    given = [value.name for value in read if value.op != "get_attr" or value.target not in clipped]
    return Segment(
        tuple(node.name for node in inside),
        entry,
        cut.name,
        tuple(given),
        tuple(at_sites[node.name] for node in inside if node.name in at_sites),
        tuple(dict.fromkeys(str(node.target) for node in inside if node.op == "call_module")),
    )


def numbers_of(segments: Sequence[Segment]) -> dict[str, int]:
    """Site -> the number of its segment."""
    return {site: at for at, segment in enumerate(segments) for site in segment.sites}


def fit_segments(
    segments: Sequence[Segment],
    graph: fx.Graph,
    module: nn.Module,
    analysis: Analysis,
    cost: Callable[[Segment], Cost],
) -> tuple[Segment, ...]:
    """Segments with what an analysis tells of them.

    Args:
        segments: Of the graph.
        graph: In functional form.
        module: Holds the parameter-free modules that the graph names.
        analysis: Of the graph.
        cost: Of a second run.
    """
    nodes = {node.name: node for node in graph.nodes}
    order = {name: at for at, name in enumerate(nodes)}
    unseen = list(_unseen(nodes, order, analysis))
    found = []
    for segment in segments:
        facts, refusal = analysis.tensor(nodes[segment.exit]), _refusal(segment, nodes, order, module, analysis)
        refusal = refusal or next(
            (why for ends, why in unseen if not ends.isdisjoint((segment.entry, segment.exit))), ""
        )
        layout = segment.layout_of_exit if facts is None or facts.layout is None else facts.layout
        found.append(replace(segment, layout_of_exit=layout, refusal=refusal, cost=cost(segment)))
    return tuple(found)


def _unseen(
    nodes: Mapping[str, fx.Node], order: Mapping[str, int], analysis: Analysis
) -> Iterator[tuple[frozenset[str], str]]:
    """Nodes that a gradient may pass beside, through memory that is written into before and read after them."""
    for name, writers in analysis.written_by.items():
        last = max((order[user.name] for user in nodes[name].users), default=-1)
        for writer in writers:
            if order[writer] < last and nodes[name] not in _following(nodes[writer]):
                beside = frozenset(between for between, at in order.items() if order[writer] <= at < last)
                yield beside, f"`{writer}` writes into `{name}`, which is read beyond its segment"


def _following(node: fx.Node) -> set[fx.Node]:
    """A node and all that depends on its value."""
    found, left = {node}, [node]
    while left:
        new = [user for user in left.pop().users if user not in found]
        found.update(new)
        left += new
    return found


def _refusal(
    segment: Segment, nodes: Mapping[str, fx.Node], order: Mapping[str, int], module: nn.Module, analysis: Analysis
) -> str:
    """Why a segment might not compute the same again, or ""."""
    for name in (segment.entry, segment.exit) if segment.entry else (segment.exit,):
        facts = analysis.tensor(nodes[name])
        is_tensor = analysis.nodes[name].is_tensor
        if not is_tensor or facts is None or facts.layout is None or not facts.dtype.is_floating_point:
            return f"`{name}`, which gradients pass it through, is not one tensor of examples"
    if any(order[writer] > order[segment.exit] for writer in analysis.written_by.get(segment.exit, ())):
        return f"`{segment.exit}` is overwritten"
    begins = order[segment.entry] if segment.entry else -1
    for name in segment.given:
        if any(order[writer] > begins for writer in analysis.written_by.get(name, ())):
            return f"`{name}`, which it reads, is overwritten"
    for name in segment.nodes:
        node = nodes[name]
        if node.op == "call_module" and any(True for _ in module.get_submodule(str(node.target)).buffers()):
            return f"`{node.target}` keeps state"
        for value in node.all_input_nodes:
            if value.op == "get_attr" and analysis.written_by.get(value.name):
                return f"it writes into `{value.target}`"
    return ""


def rerun_cost(
    segment: Segment, graph: fx.Graph, analysis: Analysis, fitted: Mapping[str, Fitted], n: int, itemsize: int
) -> Cost:
    """What a second forward and the input gradients of a segment cost.

    Args:
        segment: Of the graph.
        graph: In functional form.
        analysis: Of the graph.
        fitted: Site name -> the site at its shapes.
        n: Number of examples.
        itemsize: Bytes per element.
    """
    work: list[Work] = []
    sites = {site: fitted[site] for site in segment.sites}
    for found in sites.values():
        for signature in found.signatures.values():
            if isinstance(signature, ConvolutionSignature):
                work += convolution_work(signature, signature.channels_last)
            else:
                work += [replace(one, flops=2 * one.flops) for one in ordinary_gradient(signature, itemsize)]
        work += found.rule.own_work(found.geometry, itemsize)
    inside, elements = set(segment.nodes), 0
    for node in graph.nodes:
        if node.name in inside:
            tensors = [facts for facts in analysis.nodes[node.name].tensors if facts.dtype.is_floating_point]
            elements += sum(math.prod(facts.shape(n)) for facts in tensors)
    work.append(Work("memory", bytes=PASSES * itemsize * elements, calls=2 * len(inside)))
    return Cost(tuple(work), 0)


PASSES = 4
"""How often the memory of a value is passed, forward and backward."""


__all__ = ["Segment", "fit_segments", "numbers_of", "rerun_cost", "segments_of"]
