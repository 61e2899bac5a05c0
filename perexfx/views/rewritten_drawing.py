"""What is drawn of a rewritten model: its graph before and after the rewrite, the changed nodes marked.

Promises: as of `drawing`; a node that does other work than before, or that the rewrite added, says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx, nn

from perexfx.analysis import record
from perexfx.ir.inputs import Inputs
from perexfx.rewrites import Rewritten
from perexfx.views.drawing import Drawing, Side, boxed, boxes_of, captured_side, class_of
from perexfx.views.heat_maps import heat_maps_of
from perexfx.views.words import counted


def drawing_of_rewrite(module: Rewritten) -> Drawing:
    """The drawing of what a rewrite returned."""
    rewriting = module.rewriting
    notes = {change.place.node: f"{change.before} -> {change.after}" for change in rewriting.changes}
    before = captured_side(rewriting.before, module, _shapes_for(rewriting.before, module, rewriting.sizes), {})
    after = captured_side(module.graph, module, _shapes_for(module.graph, module, rewriting.sizes), {})
    labels = {node.id: node.label for node in before.nodes}
    marked = tuple(
        replace(node, role="rewritten", note=notes.get(node.id, "added by the rewrite"))
        if node.role == "model" and (node.id in notes or labels.get(node.id) != node.label)
        else replace(node, note=notes.get(node.id, ""))
        for node in after.nodes
    )
    after = Side(marked, after.edges)
    boxes = boxes_of(after.nodes)
    return Drawing(
        title=type(module).__name__,
        subtitle=f"{rewriting.name}, {counted(len(notes), 'change')}. {rewriting.summary}",
        before=boxed(before, boxes),
        after=boxed(after, boxes),
        boxes={path: class_of(module, path) for path in boxes},
        rows=(),
        refusals=(),
        heat_maps=heat_maps_of(module),
    )


def _shapes_for(graph: fx.Graph, module: nn.Module, sizes: tuple[Inputs, int] | None) -> Mapping[str, str]:
    """Shapes in words, by node, for a kind of input and a number of examples; nothing without them."""
    if sizes is None:
        return {}
    values = record(graph, module, sizes[0], 0, sizes[1]).values
    return {name: str(list(value.shape)) for name, value in values.items() if isinstance(value, Tensor)}


__all__ = ["drawing_of_rewrite"]
