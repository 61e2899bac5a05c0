"""Rewriting: graph and sites to a GraphModule.

Promises: the result computes what the captured graph computes, with every trainable parameter behind one clip node, one
norm node per group of sites, and one per-example-aware op per site; nothing else changes. It holds the model's own
Parameter objects under their names, and the model itself is left as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from perexfx.ir.node import annotate, info_of
from perexfx.ir.site import Site
from perexfx.runtime.cuts import cut
from perexfx.runtime.face import PerExample
from perexfx.runtime.memory_formats import enter, leave
from perexfx.runtime.nodes import clip, norm, per_example
from perexfx.runtime.state import Runtime
from perexfx.runtime.transformed import FACE, Transformed
from perexfx.sites import Region, Segment, images_of, reads_either_format

PREFIX = "perexfx_"
"""Of the names of inserted nodes: those of the captured graph keep theirs."""


def rewrite(twin: nn.Module, captured: fx.Graph, runtime: Runtime) -> Transformed:
    """The transformed module.

    Args:
        twin: From `twin_of`; its attributes become those of the result.
        captured: The graph in functional form.
        runtime: What stands behind `gm.perexfx`: the sites and regions of that graph.
    """
    face = PerExample(runtime).train(twin.training)
    body = {**twin.__dict__, "_modules": {**twin._modules, FACE: face}}
    segments = runtime.segments if runtime.settings.may_reweight else ()
    graph = _rewritten(captured, runtime.sites.sites, runtime.regions, segments)
    return Transformed(body, graph, type(twin).__name__)


def _rewritten(
    captured: fx.Graph, sites: Sequence[Site], regions: Sequence[Region], segments: Sequence[Segment]
) -> fx.Graph:
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    borders = _Borders(graph, regions)
    by_name: dict[str, fx.Node] = {}
    by_node = {site.node: site for site in sites}
    clipped = tuple(dict.fromkeys(name for site in sites for name in site.parameters))
    inputs = [node for node in captured.nodes if node.op == "placeholder"]
    for node in inputs:
        new[node] = by_name[node.name] = graph.node_copy(node)
    tape, token, parameters = _insert_clip(graph, [new[node] for node in inputs], clipped)
    borders.tape = tape
    cuts = _Cuts(graph, captured, segments, (tape, token), new)
    tokens: dict[str, fx.Node] = {}
    for node in captured.nodes:
        if node in new:
            by_name[node.name] = new[node]
            continue
        if node.op == "get_attr" and node.target in parameters:
            new[node] = parameters[node.target]
            by_name[node.name] = new[node]
            continue
        site = by_node.get(node.name)
        given = {read: borders.crossed(read, new[read], node, cuts.passed) for read in node.all_input_nodes}
        if site is None:
            new[node] = graph.node_copy(node, given.__getitem__)
        else:
            if site.group not in tokens:
                tokens[site.group] = graph.create_node(
                    "call_function", norm, (tape, cuts.token, site.group), name=f"{PREFIX}norm"
                )
                annotate(tokens[site.group], replace(info_of(node), role="norm", site=site.group))
            constants = tuple(
                tuple(by_name[name] for name in operand.expression.constants) for operand in site.operands
            )
            args: Any
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given.__getitem__)
            new[node] = graph.create_node(
                "call_function",
                per_example,
                (tape, tokens[site.group], site.name, constants, *args),
                kwargs,
                name=node.name,
            )
            new[node].meta = dict(node.meta)
            annotate(new[node], replace(info_of(node), role="site", site=site.name))
        by_name[node.name] = new[node]
        new[node] = cuts.after(node)
    return graph


class _Cuts:
    """Nodes between segments.

    Attributes:
        token: For the sites of the segment at hand.
        passed: How many segments lie behind.
    """

    def __init__(
        self,
        graph: fx.Graph,
        captured: fx.Graph,
        segments: Sequence[Segment],
        first: tuple[fx.Node, fx.Node],
        new: dict[fx.Node, fx.Node],
    ) -> None:
        self.graph, self.segments, self.new, self.passed = graph, segments, new, 0
        self.tape, self.token = first
        self.nodes = {node.name: node for node in captured.nodes}
        self.exits = {segment.exit for segment in segments}
        if segments:
            self._pass(self.token)

    def after(self, node: fx.Node) -> fx.Node:
        """What stands for a node of the captured graph, behind its cut where there is one."""
        if node.name not in self.exits:
            return self.new[node]
        self.passed += 1
        return self._taken(self._pass(self.new[node]), 1, "passed")

    def _pass(self, value: fx.Node) -> fx.Node:
        """A cut, and the token that comes out of it."""
        read = self.segments[self.passed].given if self.passed < len(self.segments) else ()
        given = [self._given(self.nodes[name]) for name in read]
        arguments = (self.tape, self.token, self.passed, value, *given)
        node = self.graph.create_node("call_function", cut, arguments, name=f"{PREFIX}cut")
        annotate(node, replace(info_of(value), role="cut", site="", overwrites=False))
        self.token = self._taken(node, 0, "token")
        return node

    def _taken(self, node: fx.Node, at: int, name: str) -> fx.Node:
        """One of the two that come out of a cut."""
        taken = self.graph.create_node("call_function", operator.getitem, (node, at), name=PREFIX + name)
        return annotate(taken, info_of(node))

    def _given(self, node: fx.Node) -> fx.Node:
        """A value that a segment reads; what the module holds may be named later in the captured graph."""
        if node not in self.new:
            self.new[node] = self.graph.node_copy(node)
        return self.new[node]


class _Borders:
    """Conversions where values cross the border of a region; one for all in a segment who read a value beyond it."""

    def __init__(self, graph: fx.Graph, regions: Sequence[Region]) -> None:
        self.graph = graph
        self.tape: fx.Node | None = None
        self.regions = {name: at for at, region in enumerate(regions) for name in region.nodes}
        self.converted: dict[tuple[str, int, bool, int], fx.Node] = {}

    def crossed(self, read: fx.Node, value: fx.Node, reader: fx.Node, segment: int) -> fx.Node:
        """`value` as a reader takes it.

        Args:
            read: In the captured graph.
            value: The same in the new graph.
            reader: In the captured graph.
            segment: Number of the reader's segment, which has conversions of its own.
        """
        inside = self.regions.get(read.name)
        wanted = self.regions.get(reader.name) if read in images_of(reader) else None
        if inside == wanted or (wanted is None and reads_either_format(reader)):
            return value
        if inside is not None:
            value = self._converted(leave, read, value, inside, segment)
        return value if wanted is None else self._converted(enter, read, value, wanted, segment)

    def _converted(
        self, conversion: Callable[..., Any], read: fx.Node, value: fx.Node, region: int, segment: int
    ) -> fx.Node:
        key = read.name, region, conversion is enter, segment
        if key not in self.converted:
            name = PREFIX + conversion.__name__
            node = self.graph.create_node("call_function", conversion, (self.tape, value, region), name=name)
            self.converted[key] = annotate(node, replace(info_of(read), role="format", site="", overwrites=False))
        return self.converted[key]


def _insert_clip(
    graph: fx.Graph, inputs: Sequence[fx.Node], names: tuple[str, ...]
) -> tuple[fx.Node, fx.Node, dict[str, fx.Node]]:
    """The tape, the clip node, and what comes out of it: the token and the parameters."""
    arguments = tuple(str(node.target).lstrip("*") for node in inputs)
    tape = graph.create_node("call_module", FACE, (arguments, *inputs), name=f"{PREFIX}tape")
    read = [graph.create_node("get_attr", name, name=f"{PREFIX}{name.replace('.', '_')}") for name in names]
    node = graph.create_node("call_function", clip, (tape, names, *read), name=f"{PREFIX}clip")
    token = graph.create_node("call_function", operator.getitem, (node, 0), name=f"{PREFIX}token")
    given = [
        graph.create_node(
            "call_function", operator.getitem, (node, at), name=f"{PREFIX}clipped_{name.replace('.', '_')}"
        )
        for at, name in enumerate(names, start=1)
    ]
    for inserted in (tape, node, token, *read, *given):
        annotate(inserted, replace(info_of(inserted), role="tape" if inserted is tape else "clip"))
    return tape, token, dict(zip(names, given, strict=True))
