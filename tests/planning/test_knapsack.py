"""The choice is the best of all within its budget."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from perexfx.ir.alternative import Alternative
from perexfx.ir.cost import Cost, Work
from perexfx.ir.errors import BudgetError
from perexfx.planning.knapsack import choose, least_bytes
from perexfx.strategies import Outer


def alternatives(rng: random.Random, count: int) -> list[Alternative]:
    costs = [Cost((Work("w"),), rng.randrange(0, 40), rng.choice((0, 0, 5, 20))) for _ in range(count)]
    return [Alternative(Outer(), rng.randrange(1, 30) / 4, cost) for cost in costs]


def total_bytes(choice: tuple[Alternative, ...]) -> int:
    return sum(a.bytes_held for a in choice) + max(a.bytes_transient for a in choice)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    rows = [alternatives(rng, rng.randrange(1, 4)) for _ in range(rng.randrange(1, 7))]
    everything = list(itertools.product(*rows))
    least = min(map(total_bytes, everything))
    assert least_bytes(rows) == least
    for budget in (least, least + 7, least + 31, 10**9):
        best = min(sum(a.seconds for a in c) for c in everything if total_bytes(c) <= budget)
        picked = choose(rows, budget)
        assert total_bytes(tuple(picked)) <= budget
        assert math.isclose(sum(a.seconds for a in picked), best)
    if least:
        with pytest.raises(BudgetError, match=f"The least that would do is {least:,} bytes"):
            choose(rows, least - 1)
