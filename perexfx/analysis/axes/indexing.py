"""Operations that pick, write or look up at positions.

Promises: as in `call.py`. Positions that depend on an example are used within that example only: along the
example axis itself the one index accepted is the examples' own number, `arange(B)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perexfx.analysis.axes.call import (
    OPAQUE,
    AxisRule,
    Mixing,
    OpCall,
    Result,
    Unknown,
    agree,
    at_axis,
    axis_from_front,
    from_right,
)
from perexfx.ir.layout import Layout

COUNTS = frozenset({"index", "_unsafe_index", "index_put", "_unsafe_index_put"}) | {
    "_embedding_bag",
    "_embedding_bag_forward_only",
}
"""Operations whose rules know what to do with an argument that counts the examples."""


def index(call: OpCall) -> Result:
    """`value[..., positions, ...]` with any number of position tensors."""
    layout, _ = _selection(call, call.argument("self"), call.argument("indices"))
    return layout


def index_put(call: OpCall) -> Result:
    """`value[..., positions, ...] = written`, or `+=`."""
    value, indices, written = (call.argument(name) for name in ("self", "indices", "values"))
    layout = call.layout(value)
    if layout is None:
        raise Unknown("it writes examples into a value that carried none")
    if any(position is not None and position.dtype in (torch.bool, torch.uint8) for position in indices):
        return _masked_put(call, layout)
    selected, rank = _selection(call, value, indices)
    own = call.layout(written)
    if own is not None and from_right(own, written.dim(), rank) != selected:
        raise Mixing("it writes one example's values into others")
    return layout


def _masked_put(call: OpCall, layout: Layout) -> Result:
    """`value[mask] = number`."""
    written = call.argument("values")
    masks = [(at, position) for at, position in enumerate(call.argument("indices")) if position is not None]
    at, mask = masks[0]
    if len(masks) != 1 or written.numel() != 1 or call.layout(written):
        raise Unknown("it hands out values one after the other wherever a mask says; use `torch.where`")
    own = call.layout(mask)
    if own is not None and at_axis(own, own.axis + at) != layout:
        raise Mixing("it writes into examples where others say so")
    return layout


def _selection(call: OpCall, value: Tensor, indices: Sequence[Tensor | None]) -> tuple[Layout | None, int]:
    """Where what positions select carries examples, and its rank."""
    used = {axis: position for axis, position in enumerate(indices) if position is not None}
    if any(position.dtype in (torch.bool, torch.uint8) for position in used.values()):
        raise Unknown("the size of its result depends on a mask; use `torch.where`, or multiply by the mask")
    rank = max(position.dim() for position in used.values())
    adjacent = list(used) == list(range(min(used), max(used) + 1))
    start = min(used) if adjacent else 0  # where torch puts the axes of the positions
    layout = call.layout(value)
    counted = {
        axis: (from_right(count.layout, position.dim(), rank), count.step)
        for axis, position in used.items()
        if (count := call.count(position))
    }
    looked_up = [from_right(own, p.dim(), rank) for p in used.values() if (own := call.layout(p))]
    if layout is None:
        if counted:
            raise Mixing("it looks up a value by the number of the example")
        place = agree(looked_up)
    elif layout.axis in used:
        count, step = counted.pop(layout.axis, (None, 0))
        if count is None or step != 1 or layout.repeats != 1 or counted:
            raise Mixing("it picks examples by position")
        place = agree([count, *looked_up])
    elif looked_up or counted:
        raise Mixing("it picks from every example what is meant for one")
    else:
        before = sum(axis < layout.axis for axis in used)
        is_after = not adjacent or layout.axis > min(used)
        axis = layout.axis - before + (rank if is_after else 0)
        return at_axis(layout, axis), rank + value.dim() - len(used)
    if place is not None:
        place = at_axis(place, start + place.axis)
    return place, rank + value.dim() - len(used)


def look_up(call: OpCall) -> Result:
    """`embedding`: rows of a table."""
    if call.layout(call.argument("weight")):
        raise Unknown("it looks up rows of a table that depends on the examples")
    return call.layout(call.argument("indices"))


def take(call: OpCall) -> Result:
    """Entries of a value by their number, whatever its shape."""
    if call.layout(call.argument("self")):
        raise Mixing("it numbers the entries of all examples together")
    return call.layout(call.argument("index"))


def bag(call: OpCall) -> Result:
    """`embedding_bag` of `[B, T]` ids: they arrive as `[B * T]`, with the places where bags begin."""
    ids, weights = call.argument("indices"), call.argument("per_sample_weights")
    layout, begins = call.layout(ids), call.count(call.argument("offsets"))
    if layout is None or call.layout(call.argument("weight")):
        raise Unknown("it sums rows of a table, or by weights, that depend on the examples")
    own_weights = call.layout(weights) if weights is not None else None
    if own_weights is not None and own_weights != layout:
        raise Mixing("it weighs the ids of one example by another's weights")
    in_order = ids.dim() == 1 and layout.before == 1 and not call.argument("include_last_offset")
    if not in_order or begins is None or begins.step != layout.after or begins.layout != Layout(0):
        raise Unknown("its bags are not shown to hold the ids of one example each; pass ids of shape [B, T]")
    return [Layout(0), *[OPAQUE] * (len(call.results) - 1)]


def gather(call: OpCall) -> Result:
    """`gather` and `scatter` and their kin: positions along `dim`, every other axis shared."""
    axis = axis_from_front(call.argument("dim"), call.argument("self").dim())
    tensors = call.tensors
    layout = agree([call.layout(tensor) for tensor in tensors])
    if layout is None:
        return None
    if layout.axis == axis:
        raise Mixing("it goes by positions along the example axis")
    if any(tensor.shape[layout.axis] != call.results[0].shape[layout.axis] for tensor in tensors):
        raise Mixing("it reads or writes a part of the example axis only")
    return layout


def along_constant_positions(call: OpCall) -> Result:
    """`index_select`, `index_add` and their kin: constant positions along `dim`."""
    value, chosen = call.argument("self"), call.layout(call.argument("index"))
    if chosen is not None:
        if call.name == "index_select" and call.layout(value) is None:
            return at_axis(chosen, axis_from_front(call.argument("dim"), value.dim()))
        raise Mixing("it picks from every example what is meant for one")
    layout = agree([call.layout(tensor) for tensor in call.tensors])
    if layout is not None and layout.axis == axis_from_front(call.argument("dim"), value.dim()):
        raise Mixing("it picks examples by position")
    source = call.argument("source")
    if isinstance(source, Tensor) and call.layout(source) and not call.layout(value):
        raise Unknown("it writes examples into a value that carried none")
    return layout


def sorted_into(values: str, boundaries: str) -> AxisRule:
    """`bucketize` and `searchsorted`: where values belong among boundaries, which may be one row or a row for each."""

    def rule(call: OpCall) -> Result:
        sequence = call.argument(boundaries)
        own = call.layout(sequence)
        if own is not None and own.axis == sequence.dim() - 1:
            raise Mixing("it compares each example with all others")
        return agree([own, call.layout(call.argument(values))])

    return rule
