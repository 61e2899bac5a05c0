"""Schedules: which batches of a training run reduced.

Promises: a schedule is a value, and a function of the number of the batch alone, so that a counter is all there is to
save; the same number always gets the same answer, on every machine.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

from perexfx.ir.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Whether a batch is reduced.

    Attributes:
        refine_from: Number of the batch from which on all are full: the tail in which a training is refined. None: no
            such tail.
    """

    refine_from: int | None = None

    def is_reduced(self, step: int) -> bool:
        """Whether the batch of that number, counted from 0, is reduced."""
        return (self.refine_from is None or step < self.refine_from) and self._is_reduced(step)

    def fraction(self, steps: int) -> float:
        """The share of reduced batches among the first ones: f. A training saves f (1 - r) of its time, where a reduced
        batch takes r of a full one's.
        """
        return sum(map(self.is_reduced, range(steps))) / steps if steps else 0.0

    @abstractmethod
    def _is_reduced(self, step: int) -> bool:
        """Without the tail."""


@dataclass(frozen=True)
class Every(Schedule):
    """The last of every `k` batches is reduced: `Every(2)` takes turns.

    Attributes:
        k: At least 1, with which all are.
    """

    k: int

    def __post_init__(self) -> None:
        _check_whole("k", self.k, 1)

    def _is_reduced(self, step: int) -> bool:
        return step % self.k == self.k - 1


@dataclass(frozen=True)
class Random(Schedule):
    """Every batch is reduced with a probability, by its number and a seed alone.

    Attributes:
        p: The probability, 0 to 1.
        seed: Another one gives other batches.
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 <= self.p <= 1:
            raise ArgumentError(f"`p` should be a probability, 0 to 1. Found {self.p!r}.")
        _check_whole("seed", self.seed, 0)

    def _is_reduced(self, step: int) -> bool:
        drawn = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "big") < self.p * 2**64


@dataclass(frozen=True)
class Then(Schedule):
    """Reduced batches first, then full ones.

    Attributes:
        cheap: How many are reduced.
        full: How many full ones follow, before reduced ones come again; None: all that follow are full.
    """

    cheap: int
    full: int | None = None

    def __post_init__(self) -> None:
        _check_whole("cheap", self.cheap, 0)
        if self.full is not None:
            _check_whole("full", self.full, 1)

    def _is_reduced(self, step: int) -> bool:
        return (step if self.full is None else step % (self.cheap + self.full)) < self.cheap


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"`{name}` should be an integer, {least} or more. Found {value!r}.")


__all__ = ["Every", "Random", "Schedule", "Then"]
