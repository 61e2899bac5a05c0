"""What is drawn: the graph before and after the rewrite, as values that every format is made from.

Promises: the same module gives an equal drawing. Every node of the captured graph is on both sides under one name, or
is a parameter that its readers list; what the rewrite added is on the right alone. A refused model has its left side,
with the culprits marked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import fx, nn

from perexfx.analysis import Analysis
from perexfx.ir.errors import ArgumentError, RefusedError
from perexfx.ir.node import info_of
from perexfx.ir.refusal import Refusal
from perexfx.runtime import Runtime, clip, cut, runtime_of
from perexfx.sites import reads_shape_only
from perexfx.views.decisions import Row, rows_of
from perexfx.views.heat_maps import HeatMap, heat_maps_of
from perexfx.views.words import clipping_in_words, counted

CLIP = "perexfx_clip"
"""Id of the clip node."""


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        id: Its name in the graph; the same on both sides.
        label: What it does.
        role: "input", "output", "model", "number" (sizes and what is computed of them), "unused" (what the output does
            not depend on), "site", "clip", "norm", "cut", "format", "rewritten" or "culprit".
        modules: The modules whose boxes it is in, the outermost first, by path.
        module: Path of the module in whose forward it was recorded.
        source: `file.py:line`, where that is known.
        shape: Of its value at the plan's batch size; "" where that is not known.
        site: The site that it is, or that it is the norm of; "".
        parameters: Those that it reads.
        refusal: Why it was refused; "" where it was not.
        note: What a rewrite made of it; "" where it is as it was.
    """

    id: str
    label: str
    role: str
    modules: tuple[str, ...] = ()
    module: str = ""
    source: str = ""
    shape: str = ""
    site: str = ""
    parameters: tuple[str, ...] = ()
    refusal: str = ""
    note: str = ""


@dataclass(frozen=True)
class Edge:
    """What reads what.

    Attributes:
        source: The node that is read.
        target: The node that reads.
        kind: "data", or "clip" for what clip and norm nodes hand out.
    """

    source: str
    target: str
    kind: str = "data"


@dataclass(frozen=True)
class Side:
    """One graph. Attributes: its nodes in order, and its edges."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Drawing:
    """Both graphs, and what is known of their sites.

    Attributes:
        title: Of the model.
        subtitle: What was done to it, or that it was refused.
        before: The captured graph.
        after: The rewritten graph; None where the model was refused.
        boxes: Path of a module -> its class.
        rows: Those of the report; none where there is no plan.
        refusals: Why the model was refused.
        heat_maps: Tables that the model holds.
    """

    title: str
    subtitle: str
    before: Side
    after: Side | None
    boxes: Mapping[str, str]
    rows: tuple[Row, ...]
    refusals: tuple[str, ...]
    heat_maps: tuple[HeatMap, ...] = ()

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that were chosen, in the order in which they appear."""
        return tuple(dict.fromkeys(row.strategy for row in self.rows))


def drawing_of(subject: nn.Module | RefusedError) -> Drawing:
    """The drawing of a transformed module, or of a model that was refused.

    Raises:
        ArgumentError: It is neither, or the error has no graph.
    """
    if isinstance(subject, RefusedError):
        return _of_refusal(subject)
    if isinstance(subject, BaseException):
        raise ArgumentError(f"A {type(subject).__name__} has no graph to draw: the forward was not captured.")
    runtime = runtime_of(subject)
    captured, analysis = runtime.captured.graph, None if runtime.kind is None else runtime.known(runtime.kind)
    plan = runtime.plan
    sites = {site.node: site.name for site in runtime.sites.sites}
    shapes = _known_shapes(analysis, 0 if plan is None else plan.batch_size)
    before = captured_side(captured, subject, shapes, sites)
    after = _rewritten_side(subject, {node.id: node for node in before.nodes}, runtime)
    boxes = boxes_of(before.nodes)
    rows = () if plan is None else rows_of(runtime.sites.sites, plan)
    planned = "not planned yet" if plan is None else f"batch of {plan.batch_size}"
    return Drawing(
        title=type(subject).__name__,
        subtitle=f"{counted(len(sites), 'site')}, {planned}, {clipping_in_words(runtime.settings)}",
        before=boxed(before, boxes),
        after=boxed(after, boxes),
        boxes={path: class_of(subject, path) for path in boxes},
        rows=rows,
        refusals=(),
        heat_maps=heat_maps_of(subject),
    )


def _of_refusal(error: RefusedError) -> Drawing:
    if error.graph is None:
        raise ArgumentError(
            f"This {type(error).__name__} has no graph to draw: it was not raised by `perexfx.transform` after the "
            "forward had been captured, or it was pickled. Draw the error that you catch."
        )
    culprits: dict[str, list[Refusal]] = {}
    for refusal in error.refusals:
        if refusal.place is not None:
            culprits.setdefault(refusal.place.node, []).append(refusal)
    side = captured_side(error.graph, error.module, {}, {})
    nodes = tuple(
        replace(node, role="culprit", refusal="\n".join(map(str, culprits[node.id]))) if node.id in culprits else node
        for node in side.nodes
    )
    boxes = boxes_of(nodes)
    return Drawing(
        title=type(error.module).__name__,
        subtitle=f"refused: {counted(len(error.refusals), 'reason')}",
        before=boxed(replace(side, nodes=nodes), boxes),
        after=None,
        boxes={path: class_of(error.module, path) for path in boxes},
        rows=(),
        refusals=tuple(map(str, error.refusals)),
    )


def _known_shapes(analysis: Analysis | None, n: int) -> dict[str, str]:
    """`[32, 16, 8, 8]` by node, where an analysis has it; several where a value has several tensors."""
    if analysis is None:
        return {}
    return {
        name: ", ".join(str(list(tensor.shape(n))) for tensor in facts.tensors)
        for name, facts in analysis.nodes.items()
    }


def captured_side(graph: fx.Graph, module: Any, shapes: Mapping[str, str], sites: Mapping[str, str]) -> Side:
    """The graph as it was captured; parameters and buffers are listed by those who read them."""
    numbers, used = _numbers(graph), _used(graph)
    nodes, edges = [], []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        info = info_of(node)
        role = {"placeholder": "input", "output": "output"}.get(node.op, "number" if node in numbers else "model")
        role = role if node in used else "unused"
        nodes.append(
            Node(
                id=node.name,
                label=_label(node, module),
                role=role,
                modules=_around(node),
                module=info.module,
                source=info.source,
                shape=shapes.get(node.name, ""),
                site=sites.get(node.name, ""),
                parameters=tuple(str(read.target) for read in node.all_input_nodes if read.op == "get_attr"),
            )
        )
        edges += [Edge(read.name, node.name) for read in node.all_input_nodes if read.op != "get_attr"]
    return Side(tuple(nodes), tuple(dict.fromkeys(edges)))


def _rewritten_side(gm: Any, known: Mapping[str, Node], runtime: Runtime) -> Side:
    """The rewritten graph. The tape is left out, and the clip node stands for the parameters that it hands out."""
    nodes, edges = [], []
    stands_for: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        info = info_of(node)
        if info.role == "tape" or node.op == "get_attr":
            continue
        if info.role == "clip":
            stands_for[node] = CLIP
            if node.target is not clip:
                continue
            nodes.append(Node(id=CLIP, label="clip", role="clip", parameters=tuple(node.args[1])))
        elif info.role == "norm":
            nodes.append(Node(node.name, "norm", "norm", _paths(info.module), info.module, site=info.site))
        elif info.role == "format":
            label = "channels last" if node.target.__name__ == "enter" else "channels first"
            nodes.append(Node(node.name, label, "format", _paths(info.module), info.module))
        elif info.role == "cut":
            label = _label_of_cut(node, runtime)
            if not label:
                stands_for[node] = stands_for[_passed_by(node)]
                continue
            nodes.append(Node(node.name, label, "cut", _paths(info.module), info.module))
        elif info.role == "site":
            parameters = runtime.sites.site(info.site).parameters
            nodes.append(replace(known[node.name], role="site", parameters=parameters))
        else:
            nodes.append(known[node.name])
        own = stands_for.setdefault(node, node.name)
        for read in [_passed_by(node)] if info.role == "cut" else node.all_input_nodes:
            source = stands_for.get(read)
            if source is None or (source == CLIP and info.role == "site"):
                continue  # the tape, constants, and parameters, which come with the norm
            is_clipping = source == CLIP or info_of(read).role == "norm"
            edges.append(Edge(source, own, "clip" if is_clipping else "data"))
    return Side(tuple(nodes), tuple(dict.fromkeys(edges)))


def _label_of_cut(node: fx.Node, runtime: Runtime) -> str:
    """What a cut's value is to the plan; "" where it is nothing, and for its token."""
    if node.target is cut or node.args[1] == 0 or runtime.plan is None:
        return ""
    through = cast(fx.Node, node.args[0])
    found = runtime.plan.cuts.get(cast(int, through.args[2]))
    if found is None or not (found.begins or found.ends):
        return ""
    return f"second run {'begins' if found.begins else 'ends'}"


def _passed_by(node: fx.Node) -> fx.Node:
    """What goes into a cut, for a node of it."""
    through, at = (node, 1) if node.target is cut else (cast(fx.Node, node.args[0]), node.args[1])
    return cast(fx.Node, through.args[3 if at else 1])


def _numbers(graph: fx.Graph) -> set[fx.Node]:
    """Sizes, and what is computed of them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_arithmetic = getattr(node.target, "__module__", "") in (operator.add.__module__, math.ceil.__module__)
        read = node.all_input_nodes
        if reads_shape_only(node) or (is_arithmetic and read and found.issuperset(read)):
            found.add(node)
    return found


def _used(graph: fx.Graph) -> set[fx.Node]:
    """What the output depends on."""
    found = {node for node in graph.nodes if node.op == "output"}
    for node in reversed(graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _label(node: fx.Node, module: Any) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output", "call_method"):
        return str(node.target)
    if node.target is getattr:
        return f".{node.args[1]}"
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def boxes_of(nodes: Iterable[Node]) -> list[str]:
    """The modules that are drawn as boxes: those that say more than a node or a box inside them says."""
    members: dict[str, set[str]] = {}
    for node in nodes:
        for path in node.modules:
            members.setdefault(path, set()).add(node.id)
    return [
        path
        for path, inside in members.items()
        if len(inside) > 1 and not any(other.startswith(f"{path}.") and members[other] == inside for other in members)
    ]


def _around(node: fx.Node) -> tuple[str, ...]:
    """The modules around a node; a module that is one node has no box of its own, however often it is called."""
    paths = _paths(info_of(node).module)
    return paths[:-1] if node.op == "call_module" else paths


def _paths(module: str) -> tuple[str, ...]:
    """A module's path and those of the modules around it, the outermost first."""
    parts = module.split(".") if module else []
    return tuple(".".join(parts[: at + 1]) for at in range(len(parts)))


def boxed(side: Side, boxes: Collection[str]) -> Side:
    """The side with every node in the boxes that are drawn."""
    nodes = tuple(replace(node, modules=tuple(p for p in node.modules if p in boxes)) for node in side.nodes)
    return replace(side, nodes=nodes)


def class_of(module: Any, path: str) -> str:
    """The class of a module by its path; "" where there is none."""
    try:
        return type(module.get_submodule(path)).__name__
    except AttributeError:
        return ""


__all__ = [
    "Drawing",
    "Edge",
    "Node",
    "Side",
    "boxed",
    "boxes_of",
    "captured_side",
    "class_of",
    "drawing_of",
]
