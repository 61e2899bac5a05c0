"""Mixing, seen from outside: one example's inputs are changed, and the others' outputs are watched.

Promises: any change beyond what two equal calls differ by is reported, with the output and the pair of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from perexfx.inspecting.check.compare import change
from perexfx.inspecting.check.reference import Call, rows_of
from perexfx.inspecting.check.result import Mixed
from perexfx.ir.layout import Layout

NOISE = 10
"""Outputs may move by this many times what equal calls differ by: two calls do not show the most there is."""


def find_mixing(
    forward: Callable[[Call], dict[str, Tensor]],
    call: Call,
    n: int,
    layouts: Mapping[str, Layout | None],
    noise: Mapping[str, float],
) -> tuple[list[Mixed], list[str]]:
    """Every pair of examples of which one moves the other.

    Args:
        forward: From inputs to outputs by name.
        call: Of n examples.
        n: Their number.
        layouts: Where each output carries examples; None where it carries none.
        noise: By how much each output differs between equal calls.

    Returns:
        What was found, and what could not be tried.
    """
    if n == 1:
        return [], ["of one example alone nothing can be said about mixing"]
    before = forward(call)
    found, notes = [], []
    for i in range(n):
        changed = changed_at(call, i, (i + 1) % n)
        if changed is None:
            notes.append(f"example {i} could not be changed: its inputs are all alike")
            continue
        after = forward(changed)
        for name, layout in layouts.items():
            found += _moved(name, before[name], after[name], layout, i, NOISE * noise[name])
    return found, notes


def _moved(name: str, before: Tensor, after: Tensor, layout: Layout | None, changed: int, noise: float) -> list[Mixed]:
    if before.shape != after.shape:
        return [Mixed(name, changed, None, float("inf"))]
    if layout is None:
        size = float(change(before.reshape(1, -1), after.reshape(1, -1)))
        return [Mixed(name, changed, None, size)] if size > noise else []
    sizes = change(rows_of(before, layout), rows_of(after, layout)).tolist()
    return [Mixed(name, changed, j, size) for j, size in enumerate(sizes) if j != changed and size > noise]


def changed_at(call: Call, i: int, other: int) -> Call | None:
    """With another example's inputs in place of those of example i; None where nothing else can be put there."""
    moved = False

    def changed(value: Tensor, axis: int) -> Tensor:
        nonlocal moved
        own, new = value.select(axis, i), value.select(axis, other)
        for candidate in (new, _another(own)):
            if not torch.equal(candidate, own):
                moved = True
                value = value.clone()
                value.select(axis, i).copy_(candidate)
                break
        return value

    result = call.with_tensors(changed)
    return result if moved else None


def _another(row: Tensor) -> Tensor:
    """Other values than those of a row: other numbers, or the same ids in another order."""
    if row.is_floating_point() or row.is_complex():
        return 1.25 * row + 0.125
    return row.flatten().roll(1).view(row.shape)
