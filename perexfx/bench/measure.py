"""How times are measured: steps in turn in one process."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from perexfx.machine import seconds_of

CPU = torch.device("cpu")
WARM_UP = 3
FEWEST = 3
"""Rounds that are taken however long they take."""


@dataclass(frozen=True)
class Timing:
    """Steps, timed in turn.

    Attributes:
        seconds: Name of a step -> its seconds in each round.
    """

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds of one step."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str = "ordinary") -> float:
        """Median over rounds of one step's time / another's within the round: machines drift."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))


def in_turn(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device = CPU, limit: float = math.inf
) -> Iterator[Timing]:
    """Times steps in turn; yields what is known after each round.

    Args:
        steps: By name.
        rounds: How many times each is timed.
        device: What the steps run on.
        limit: Seconds after which no further round is begun, once there are `FEWEST`.
    """
    start = time.perf_counter()
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
        if time.perf_counter() - start > limit / 4:
            break
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds):
        if at >= FEWEST and time.perf_counter() - start > limit:
            return
        for name, step in steps.items():
            taken[name].append(seconds_of(step, device))
        yield Timing({name: tuple(seconds) for name, seconds in taken.items()})


def timed(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device = CPU, limit: float = math.inf
) -> Timing:
    """What is known after the last round. Arguments: as of `in_turn`."""
    *_, timing = in_turn(steps, rounds, device, limit)
    return timing
