"""Choosing under a memory budget.

Promises: the choice fits the budget. Over bytes that add up it is the fastest that fits, exactly; a peak is less than
their sum, so the sum may be as large as the peak allows, and then every single change that makes the step faster and
fits is made. So it is with alternatives that go together, from all of them on. A budget that nothing was found to fit
raises, and names the least that was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

from perexfx.ir.alternative import Alternative
from perexfx.ir.errors import BudgetError

Rows = Sequence[Sequence[Alternative]]
Choice = Sequence[Alternative]
Bundles = Sequence[Mapping[int, Alternative]]

HALVINGS = 12
"""How closely the bound on the sum is brought to the one that the peak allows."""


def total_bytes(choice: Choice) -> int:
    """Everything held, and the largest transient: no peak is higher."""
    return sum(a.bytes_held for a in choice) + max(map(_transient, choice), default=0)


def choose(
    rows: Rows, budget: int, bytes_added: Callable[[Choice], int] = total_bytes, bundles: Bundles = ()
) -> list[Alternative]:
    """One alternative per row, the least time within the budget.

    Args:
        rows: The alternatives.
        budget: Bytes that may be added.
        bytes_added: What a choice adds.
        bundles: More alternatives, that go together or not at all: by the number of their row.

    Raises:
        BudgetError: The budget is too small; the message names the least that suffices.
    """
    fastest = [min(row, key=lambda a: a.seconds) for row in rows]
    if bytes_added(fastest) <= budget:
        return fastest
    fitting = [
        _choose_bundles(rows, fastest, budget, bytes_added, bundles) if bundles else None,
        _choose_alone(rows, fastest, budget, bytes_added),
    ]
    found = min((choice for choice in fitting if choice is not None), key=_seconds, default=None)
    if found is None:
        least = bytes_added(leanest(rows, bytes_added, bundles))
        raise BudgetError(
            f"No plan fits memory_budget={budget:,} bytes. The least that would do is {least:,} "
            "bytes at this batch size. Raise the budget or lower the batch size."
        )
    return found


def _choose_bundles(
    rows: Rows, fastest: Choice, budget: int, bytes_added: Callable[[Choice], int], bundles: Bundles
) -> list[Alternative] | None:
    """From all bundles, or where these do not fit from the leanest choice: every change that is faster and fits."""
    choice = _replaced(fastest, *bundles)
    if bytes_added(choice) > budget:
        choice = leanest(rows, bytes_added, bundles)
        if bytes_added(choice) > budget:
            return None
    return _improved(rows, choice, budget, bytes_added, bundles)


def _replaced(choice: Choice, *changes: Mapping[int, Alternative]) -> list[Alternative]:
    """A choice with other alternatives at some rows, by their numbers."""
    changed = {at: alternative for change in changes for at, alternative in change.items()}
    return [changed.get(at, alternative) for at, alternative in enumerate(choice)]


def _choose_alone(
    rows: Rows, fastest: Choice, budget: int, bytes_added: Callable[[Choice], int]
) -> list[Alternative] | None:
    """One alternative per row, each by itself; None where nothing fits."""
    found, low, high = _fastest_within(rows, budget), budget, total_bytes(fastest)
    if found is None or bytes_added(found) > budget:
        found = _leanest_alone(rows, bytes_added)
        if bytes_added(found) > budget:
            return None
        low = max(low, least_bytes(rows))
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        tried = _fastest_within(rows, middle)
        if tried is not None and bytes_added(tried) <= budget:
            found, low = min(found, tried, key=_seconds), middle
        else:
            high = middle
    return _improved(rows, found, budget, bytes_added)


def least_bytes(rows: Rows) -> int:
    """The smallest sum of bytes of any choice."""
    least = math.inf
    for cap in _caps(rows):
        allowed = [[a.bytes_held for a in row if _transient(a) <= cap] for row in rows]
        if all(allowed):
            least = min(least, cap + sum(min(row) for row in allowed))
    return int(least)


def _transient(alternative: Alternative) -> int:
    return max(alternative.bytes_transient, alternative.bytes_summing)


def _caps(rows: Rows) -> list[int]:
    """The possible largest transients, the largest first."""
    return sorted({_transient(a) for row in rows for a in row}, reverse=True)


def _seconds(choice: Choice) -> float:
    return sum(a.seconds for a in choice)


def leanest(rows: Rows, bytes_added: Callable[[Choice], int], bundles: Bundles = ()) -> list[Alternative]:
    """The choice that adds least to the peak: alternatives by themselves, or bundles in the place of some.

    From all bundles every single one is given up, or taken again, that adds less so.
    """
    alone = _leanest_alone(rows, bytes_added)
    choice, improves = _replaced(alone, *bundles), bool(bundles)
    added = bytes_added(choice)
    while improves:
        improves = False
        for bundle in bundles:
            is_taken = all(choice[at] is alternative for at, alternative in bundle.items())
            tried = _replaced(choice, {at: alone[at] for at in bundle} if is_taken else bundle)
            if (less := bytes_added(tried)) < added:
                choice, added, improves = tried, less, True
    return min(alone, choice, key=lambda other: (bytes_added(other), _seconds(other)))


def _leanest_alone(rows: Rows, bytes_added: Callable[[Choice], int]) -> list[Alternative]:
    """From the choice whose sum is least, every single change that adds less."""
    choice = _fastest_within(rows, least_bytes(rows))
    assert choice is not None
    added, improves = bytes_added(choice), True
    while improves:
        improves = False
        for at, row in enumerate(rows):
            for other in row:
                tried = [*choice[:at], other, *choice[at + 1 :]]
                if (less := bytes_added(tried)) < added:
                    choice, added, improves = tried, less, True
    return choice


def _improved(
    rows: Rows,
    choice: list[Alternative],
    budget: int,
    bytes_added: Callable[[Choice], int],
    bundles: Bundles = (),
) -> list[Alternative]:
    """The choice after every single change that is faster and fits, those that gain most first.

    A change is another alternative at one row, or the fastest ones in the place of a bundle.
    """
    fastest = {at: min(row, key=lambda a: a.seconds) for at, row in enumerate(rows)}
    changes = [{at: a} for at, row in enumerate(rows) for a in row]
    changes += [{at: fastest[at] for at in bundle} for bundle in bundles]
    parts = {at: a for bundle in bundles if len(bundle) > 1 for at, a in bundle.items()}

    def gain(change: Mapping[int, Alternative]) -> float:
        return sum(choice[at].seconds - a.seconds for at, a in change.items())

    improves = True
    while improves:
        improves = False
        for change in sorted(changes, key=gain, reverse=True):
            parts_one = len(change) == 1 and any(parts.get(at) is choice[at] for at in change)
            if gain(change) > 0 and not parts_one:
                tried = _replaced(choice, change)
                if bytes_added(tried) <= budget:
                    choice, improves = tried, True
    return choice


def _fastest_within(rows: Rows, budget: int) -> list[Alternative] | None:
    """The fastest choice whose sum of bytes fits: a multiple-choice knapsack, solved exactly.

    For each possible largest transient the rest is a knapsack over bytes held, solved by extending row by row the
    choices that are not dominated.
    """
    best: list[Alternative] | None = None
    for cap in _caps(rows):
        allowed = [[a for a in row if _transient(a) <= cap] for row in rows]
        if not all(allowed):
            break
        found = _knapsack(allowed, budget - cap, _seconds(best) if best else math.inf)
        best = found or best
    return best


def _knapsack(rows: Rows, budget: int, bound: float) -> list[Alternative] | None:
    """The fastest choice with `sum(bytes_held) <= budget` and less than `bound` seconds."""
    held_after = [0] * (len(rows) + 1)
    seconds_after = [0.0] * (len(rows) + 1)
    for at in reversed(range(len(rows))):
        held_after[at] = held_after[at + 1] + min(a.bytes_held for a in rows[at])
        seconds_after[at] = seconds_after[at + 1] + min(a.seconds for a in rows[at])
    front: list[_Partial] = [(0, 0.0, None)]
    for at, row in enumerate(rows):
        fits_held, fits_seconds = budget - held_after[at + 1], bound - seconds_after[at + 1]
        extended = [
            (held, seconds, (partial, a))
            for partial in front
            for a in row
            if (held := partial[0] + a.bytes_held) <= fits_held and (seconds := partial[1] + a.seconds) < fits_seconds
        ]
        extended.sort(key=operator.itemgetter(0, 1))
        front, fastest = [], math.inf
        for partial in extended:
            if partial[1] < fastest:
                front.append(partial)
                fastest = partial[1]
    return _taken(front[-1]) if front else None


_Partial = tuple[int, float, "tuple[_Partial, Alternative] | None"]
"""Bytes held and seconds of a choice for the first rows, and the choice for one row less with the last alternative."""


def _taken(choice: _Partial) -> list[Alternative]:
    """The alternatives, in the order of the rows."""
    found, (_, _, last) = [], choice
    while last is not None:
        (_, _, before), alternative = last
        found.append(alternative)
        last = before
    return found[::-1]
