"""What a step holds at every moment, and the most that it ever holds.

Promises: a timeline counts storages, so memory that several tensors share counts once; it says what would be held if
some storages lived longer and if others came in between, without another run. Two timelines of one step give that of
any batch size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


class Span(NamedTuple):
    """Memory that is held for a while.

    Attributes:
        start: The tick at which it is there for the first time.
        end: The tick at which it is there no more.
        bytes: How much.
    """

    start: int
    end: int
    bytes: int


@dataclass(frozen=True)
class Timeline:
    """The storages of one step; parameters and inputs, which are there before, do not count.

    Attributes:
        ticks: How many there are: one for every storage that comes or goes, and for every event of interest.
        storages: In the order in which they came.
    """

    ticks: int
    storages: tuple[Span, ...]

    def peak(self, lives_until: Mapping[int, int] | None = None, others: Iterable[Span] = ()) -> int:
        """The most bytes that are held at once.

        Args:
            lives_until: Storage -> a tick up to which it lives, where that is longer than it does by itself.
            others: What is held besides.
        """
        changes = self._changes.copy()
        for at, end in (lives_until or {}).items():
            span = self.storages[at]
            if end > span.end:
                changes[span.end] += span.bytes
                changes[end] -= span.bytes
        for start, end, size in others:
            changes[start] += size
            changes[end] -= size
        return max(accumulate(changes))

    def peak_of(
        self, parts: Sequence[tuple[int, int]], without: Collection[int] = (), others: Iterable[Span] = ()
    ) -> int:
        """The most bytes held at once of what comes in some parts of the step, as if these were all of it.

        Args:
            parts: First and last tick of each, in order.
            without: Storages that do not count.
            others: What is held besides.
        """
        changes = [0] * (self.ticks + 2)
        for start, end, size in others:
            changes[start] += size
            changes[end] -= size
        for at, (start, end, size) in enumerate(self.storages):
            if at not in without and any(first <= start <= last for first, last in parts):
                changes[start] += size
                changes[end] -= size
        held = list(accumulate(changes))
        return max((max(held[first : last + 1], default=0) for first, last in parts), default=0)

    @cached_property
    def _changes(self) -> list[int]:
        """By how many bytes each tick changes what is held."""
        changes = [0] * (self.ticks + 2)
        for start, end, size in self.storages:
            changes[start] += size
            changes[end] -= size
        return changes

    def between(self, n: int, other: Timeline, other_n: int, wanted: int) -> Timeline | None:
        """The timeline for another batch size; None where the two differ in more than sizes.

        Args:
            n: The batch size of this one.
            other: The same step for another batch size.
            other_n: That batch size.
            wanted: The batch size asked for.
        """
        pairs = list(zip(self.storages, other.storages, strict=False))
        if len(self.storages) != len(other.storages) or any((a.start, a.end) != (b.start, b.end) for a, b in pairs):
            return None
        grown = (a.bytes + (b.bytes - a.bytes) * (wanted - n) // (other_n - n) for a, b in pairs)
        return replace(
            self, storages=tuple(a._replace(bytes=size) for a, size in zip(self.storages, grown, strict=True))
        )


__all__ = ["Span", "Timeline"]
