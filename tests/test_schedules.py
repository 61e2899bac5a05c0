"""Schedules: functions of the batch's number."""

from __future__ import annotations

import pytest

import perexfx
from perexfx.schedules import Every, Random, Schedule, Then

SCHEDULES = [Every(2), Every(3, refine_from=7), Random(0.4, seed=3), Then(3), Then(2, 3), Then(2, 3, refine_from=6)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_number_gets_the_same_answer(schedule: Schedule) -> None:
    asked = [schedule.is_reduced(step) for step in range(40)]
    assert asked == [schedule.is_reduced(step) for step in reversed(range(40))][::-1]
    assert schedule.fraction(40) == sum(asked) / 40
    assert schedule == type(schedule)(**vars(schedule))


def test_which_batches() -> None:
    def of(schedule: Schedule, steps: int = 10) -> str:
        return "".join("r" if schedule.is_reduced(step) else "f" for step in range(steps))

    assert of(Every(2)) == "frfrfrfrfr"
    assert of(Every(3, refine_from=7)) == "ffrffrffff"
    assert of(Every(1, refine_from=3)) == "rrrfffffff"
    assert of(Then(3)) == "rrrfffffff"
    assert of(Then(2, 3)) == "rrfffrrfff"
    assert of(Random(0.0)) == "f" * 10
    assert of(Random(1.0)) == "r" * 10


def test_random_batches_follow_probability_and_seed() -> None:
    share = Random(0.3).fraction(4000)
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    first, second = ([Random(0.5, seed=s).is_reduced(step) for step in range(64)] for s in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Every(0), "`k`"),
        (lambda: Every(1.5), "`k`"),
        (lambda: Random(1.2), "`p`"),
        (lambda: Random(0.5, seed=-1), "`seed`"),
        (lambda: Then(-1), "`cheap`"),
        (lambda: Then(2, 0), "`full`"),
    ],
)
def test_mistakes(make: object, name: str) -> None:
    assert callable(make)
    with pytest.raises(perexfx.ArgumentError, match=name):
        make()
