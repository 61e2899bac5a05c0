"""Values that read no example but follow their number: `zeros(B, ...)`, `cls.expand(B, ...)`.

Promises: a value is taken to have rows of its own for each example only where every row is alike or drawn at random, so
that it does not matter whose is whose.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from perexfx.axes import OpCall, axis_from_front
from perexfx.ir.layout import Layout

_SIZES = frozenset({"size", "sizes", "shape", "repeats", "split_size", "split_sizes", "N", "stride"})


_BOUNDS = frozenset({"start", "end", "length", "index"})


MOVES = frozenset(
    "view _unsafe_view reshape _reshape_alias unsqueeze squeeze permute transpose t expand clone detach alias "
    "contiguous _to_copy repeat lift_fresh".split()
)
"""Operations after which equal entries are still equal entries."""


UNIFORM = frozenset(
    "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "scalar_tensor empty_strided new_empty_strided".split()
)
"""Operations that make equal entries (or entries that are written before they are read)."""


_DRAWN = frozenset("rand randn rand_like randn_like bernoulli".split())


def sizes_of(call: OpCall) -> set[str]:
    """Names of the arguments of a call that say how large its result is, and so may follow the batch size."""
    names = set(_SIZES)
    if call.name in ("slice", "narrow", "select"):
        value = call.argument("self")
        layout = call.layout(value)
        if layout is not None and axis_from_front(call.argument("dim", 0), value.dim()) == layout.axis:
            names |= _BOUNDS
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
    if call.name in UNIFORM or call.name in _DRAWN:
        return Layout(axis) if is_batch else None
    if call.name in ("expand", "repeat"):  # equal copies of a constant: whose is whose does not matter
        value = call.argument("self")
        lead = result.dim() - value.dim()
        size = value.shape[axis - lead] if axis >= lead else 1
        copies = result.shape[axis] // size
        return Layout(axis, copies // call.n, size) if copies % call.n == 0 else None
    return None
