"""Choosing: one alternative per row, least time within a budget of bytes.

Promises: exact, and the same for the same rows; a budget that nothing fits raises, and names the least that would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from perexfx.ir.alternative import Alternative
from perexfx.ir.errors import BudgetError


def choose(candidates: Sequence[Sequence[Alternative]], budget: int | None) -> list[Alternative]:
    """One alternative per row, least total time within the budget: a multiple-choice knapsack, solved exactly.

    The bytes of a choice are everything held plus the largest transient. For each possible largest transient the rest
    is a knapsack over bytes held, solved by extending row by row the choices that are not dominated.

    Raises:
        BudgetError: The budget is too small; the message names the least that suffices.
    """
    fastest = [min(row, key=lambda a: a.seconds) for row in candidates]
    if budget is None or _bytes(fastest) <= budget:
        return fastest
    best: list[Alternative] | None = None
    for cap in sorted({a.bytes_transient for row in candidates for a in row}, reverse=True):
        allowed = [[a for a in row if a.bytes_transient <= cap] for row in candidates]
        if not all(allowed):
            break
        bound = sum(a.seconds for a in best) if best else math.inf
        found = _knapsack(allowed, budget - cap, bound)
        best = found or best
    if best is None:
        raise BudgetError(
            f"No plan fits memory_budget={budget:,} bytes. The least that would do is {least_bytes(candidates):,} "
            "bytes at this batch size. Raise the budget or lower the batch size."
        )
    return best


def _bytes(choice: Sequence[Alternative]) -> int:
    return sum(a.bytes_held for a in choice) + max((a.bytes_transient for a in choice), default=0)


def least_bytes(candidates: Sequence[Sequence[Alternative]]) -> int:
    """The smallest budget that some plan fits."""
    least = math.inf
    for cap in {a.bytes_transient for row in candidates for a in row}:
        allowed = [[a.bytes_held for a in row if a.bytes_transient <= cap] for row in candidates]
        if all(allowed):
            least = min(least, cap + sum(min(row) for row in allowed))
    return int(least)


def _knapsack(rows: Sequence[Sequence[Alternative]], budget: int, bound: float) -> list[Alternative] | None:
    """The fastest choice with `sum(bytes_held) <= budget` and less than `bound` seconds."""
    held_after = [0] * (len(rows) + 1)
    seconds_after = [0.0] * (len(rows) + 1)
    for at in reversed(range(len(rows))):
        held_after[at] = held_after[at + 1] + min(a.bytes_held for a in rows[at])
        seconds_after[at] = seconds_after[at + 1] + min(a.seconds for a in rows[at])
    front: list[tuple[int, float, tuple[Alternative, ...]]] = [(0, 0.0, ())]
    for at, row in enumerate(rows):
        extended = sorted(
            ((held + a.bytes_held, seconds + a.seconds, (*taken, a)) for held, seconds, taken in front for a in row),
            key=lambda choice: choice[:2],
        )
        front, fastest = [], math.inf
        for held, seconds, taken in extended:
            fits = held + held_after[at + 1] <= budget and seconds + seconds_after[at + 1] < bound
            if fits and seconds < fastest:
                front.append((held, seconds, taken))
                fastest = seconds
    return list(front[-1][2]) if front else None
