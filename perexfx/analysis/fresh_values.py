"""Values that read no example but follow their number: `zeros(B, ...)`, `cls.expand(B, ...)`, `arange(B)`.

Promises: a value is taken to have rows of its own for each example only where every row is alike or drawn at random, so
that it does not matter whose is whose. A value that counts the examples is known as such only while it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perexfx.analysis.axes.call import Counting, Mixing, OpCall, Unknown, axis_from_front
from perexfx.analysis.axes.propagate import rule_of
from perexfx.ir.layout import Layout

_SIZES = frozenset({"size", "sizes", "shape", "repeats", "split_size", "split_sizes"})


_OWN_SIZES = {
    "native_group_norm": {"N"},
    "as_strided": {"stride"},
    "empty_strided": {"stride"},
    "new_empty_strided": {"stride"},
}
"""Operations with a size of another name."""


MOVES = frozenset(
    "view _unsafe_view _reshape_alias unsqueeze squeeze permute transpose t expand clone detach alias _to_copy repeat "
    "lift_fresh slice select".split()
)
"""Operations after which equal entries are still equal entries, and after which what counts still counts."""


UNIFORM = frozenset(
    "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "scalar_tensor empty_strided new_empty_strided".split()
)
"""Operations that make equal entries (or entries that are written before they are read)."""


_DRAWN = frozenset("rand randn randint normal".split())


def sizes_of(call: OpCall) -> set[str]:
    """Names of the arguments of a call that say how large its result is, and so may follow the batch size."""
    names = {*_SIZES, *_OWN_SIZES.get(call.name, ())}
    if call.name in ("slice", "slice_scatter"):
        value = call.argument("self")
        layout = call.layouts.get(id(value))
        if layout is not None and axis_from_front(call.argument("dim", 0), value.dim()) == layout.axis:
            names |= {"start", "end"}
    return names


def created_layout(call: OpCall, result: Tensor, grown: Sequence[int], is_batch: bool) -> Layout | None:
    """Where a value that reads no example has a row for each; None where that is not plain.

    Args:
        call: Made the value.
        result: The value.
        grown: Its axes whose size follows the batch size.
        is_batch: Whether the first of these has exactly the size of the batch.
    """
    if len(grown) != 1:
        return None
    axis = grown[0]
    if result.numel() == 0 and is_batch:  # no entries, and so nobody's
        return Layout(axis)
    if call.name in UNIFORM or call.name in _DRAWN:
        return Layout(axis) if is_batch else None
    if call.name in ("expand", "repeat"):  # equal copies of a constant: whose is whose does not matter
        value = call.argument("self")
        lead = result.dim() - value.dim()
        size = value.shape[axis - lead] if axis >= lead else 1
        copies = result.shape[axis] // size
        return Layout(axis, copies // call.n, size) if copies % call.n == 0 else None
    return None


def stays_uniform(call: OpCall, uniform: set[int]) -> bool:
    """Whether the result of a call on values of equal entries has equal entries."""
    if call.name in MOVES:
        return True
    is_pointwise = torch.Tag.pointwise in call.func.tags or call.name in ("fill_", "zero_")
    return is_pointwise and all(id(tensor) in uniform or tensor.numel() == 1 for tensor in call.tensors)


def counts_examples(call: OpCall, result: Tensor) -> Counting | None:
    """How a value made by `arange` counts the examples; None where it does not."""
    if call.name != "arange" or call.differing != {"end"} or result.dtype not in (torch.int64, torch.int32):
        return None
    start, end, step = call.argument("start", 0), call.argument("end"), call.argument("step", 1)
    counts = start == 0 and isinstance(step, int) and step > 0 and end == step * call.n
    return Counting(Layout(0), step) if counts else None


def still_counts(call: OpCall, counting: Mapping[int, Counting]) -> list[Counting] | None:
    """How the results of a call on one value that counts the examples count them; None where they do not."""
    if call.name not in MOVES or len(call.tensors) != 1:
        return None
    (value,) = call.tensors
    count = counting[id(value)]
    rule = rule_of(call.func)
    assert rule is not None
    try:
        found = rule(replace(call, layouts={id(value): count.layout}, counting={}))
    except (Mixing, Unknown):
        return None
    places = found if isinstance(found, list) else [found] * len(call.results)
    whole = all(result.dtype in (torch.int64, torch.int32) for result in call.results)
    kept = [Counting(place, count.step) for place in places if isinstance(place, Layout)]
    return kept if whole and len(kept) == len(call.results) else None
