"""A rehearsal: the memory of one step, for every choice of strategies.

Promises: it is made once, and tells the peak of any choice without another run: what a choice holds lives on until the
clip node, what it has for a moment is put in between, and what it runs a second time comes last. Two rehearsals of one
step give that of any batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from perexfx.ir.alternative import Alternative
from perexfx.ir.site import Key
from perexfx.planning import Rerun, cuts_of, reruns_of
from perexfx.rehearsal.timeline import Span, Timeline
from perexfx.sites import Segment


@dataclass(frozen=True)
class HandedOver:
    """The factors of one operand of one site.

    Attributes:
        at: The tick at which the site handed them over.
        until: The tick at which the clip node has summed them.
        storages: Where they lie, of the clipped step's timeline.
        total: Where their sum lies.
    """

    at: int
    until: int
    storages: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class Passed:
    """A value between two segments.

    Attributes:
        forward: The tick at which it was there.
        backward: The tick at which its gradient was; past the end where it has none.
        gradient: The storages of that.
    """

    forward: int
    backward: int
    gradient: tuple[int, ...]


@dataclass(frozen=True)
class Passages:
    """Where a step passes from one segment to the next.

    Attributes:
        cuts: Name of the value between them -> when it came and went.
        values: Name of a value that segments read -> its storages.
        results: The storages of the parameters' gradients.
    """

    cuts: Mapping[str, Passed]
    values: Mapping[str, tuple[int, ...]]
    results: frozenset[int]


@dataclass(frozen=True)
class Rehearsal:
    """The memory of one step, for one batch size and every choice of strategies.

    Attributes:
        n: Number of examples.
        ordinary: The step without clipping.
        clipped: The clipped step as if nothing were held for the clip node.
        handed_over: (site, operand) -> its factors; those whose strategy is a choice.
        segments: The parts of the graph that may run a second time.
        passages: Where the clipped step passes from one segment to the next.
    """

    n: int
    ordinary: Timeline
    clipped: Timeline
    handed_over: Mapping[Key, HandedOver]
    segments: tuple[Segment, ...]
    passages: Passages

    def bytes_added(self, chosen: Mapping[Key, Alternative]) -> int:
        """Peak memory of the clipped step less that of the ordinary step; below zero where clipping needs less."""
        return self.clipped_bytes(chosen) - self.ordinary_bytes

    @cached_property
    def ordinary_bytes(self) -> int:
        """Peak memory of the ordinary step."""
        return self.ordinary.peak()

    def clipped_bytes(self, chosen: Mapping[Key, Alternative]) -> int:
        """Peak memory of the clipped step with a choice of strategies."""
        again = [key for key in self.handed_over if chosen[key].is_second_run]
        sums = {key: self._sum_again(key, chosen[key]) for key in again}
        lives_until, others = self._second_runs(reruns_of(again, self.segments), sums) if again else ({}, [])
        for key, handed in self.handed_over.items():
            cost = chosen[key].cost
            assert cost is not None
            others.append(Span(handed.at, handed.at + 1, cost.bytes_transient))
            if key in again:
                total = self.clipped.storages[handed.total]
                others.append(total._replace(bytes=-total.bytes))  # it is part of the second run
                continue
            others.append(Span(handed.until, handed.until + 1, cost.bytes_summing))
            if cost.holds_factors:
                lives_until |= {at: max(handed.until + 1, lives_until.get(at, 0)) for at in handed.storages}
            else:
                others.append(Span(handed.at, handed.until + 1, cost.bytes_held))
        return self.clipped.peak(lives_until, others)

    def _sum_again(self, key: Key, chosen: Alternative) -> tuple[Span, Span]:
        """A clipped sum of a second run, and what is held for a moment as it is formed."""
        handed, end = self.handed_over[key], self.clipped.ticks
        total = Span(handed.at, end, self.clipped.storages[handed.total].bytes)
        return total, Span(handed.at, handed.at + 1, chosen.bytes_summing)

    def _second_runs(
        self, reruns: Sequence[Rerun], sums: Mapping[Key, tuple[Span, Span]]
    ) -> tuple[dict[int, int], list[Span]]:
        """What reruns keep until the clip node has summed all else, and what they hold then, one after another."""
        cuts, values = self.passages.cuts, self.passages.values
        end = max(handed.until for handed in self.handed_over.values())
        kept = {name for cut in cuts_of(reruns, self.segments).values() for name in cut.keeps}
        storages = [values[name] for name in kept if name in values]
        storages += [cuts[self.segments[rerun.last].exit].gradient for rerun in reruns]
        lives_until = {at: end + 1 for group in storages for at in group}
        return lives_until, [Span(end, end + 1, max(self._second_run(rerun, sums) for rerun in reruns))]

    def _second_run(self, rerun: Rerun, sums: Mapping[Key, tuple[Span, Span]]) -> int:
        """The most that a rerun holds besides: what its part of the clipped step does, its result, and its sums."""
        cuts, first = self.passages.cuts, self.segments[rerun.first]
        begins = cuts[first.entry] if first.entry else Passed(0, self.clipped.ticks, ())
        ends = cuts[self.segments[rerun.last].exit]
        parts = [(begins.forward + 1, ends.forward), (ends.backward, begins.backward)]
        result = sum(self.clipped.storages[at].bytes for at in ends.gradient)
        formed = [span for key in rerun.keys for span in sums[key]]
        return result + self.clipped.peak_of(parts, self.passages.results, formed)

    def between(self, other: Rehearsal, n: int) -> Rehearsal | None:
        """The rehearsal for another batch size; None where the two differ in more than sizes."""
        ordinary = self.ordinary.between(self.n, other.ordinary, other.n, n)
        clipped = self.clipped.between(self.n, other.clipped, other.n, n)
        same = self.handed_over == other.handed_over and self.passages == other.passages
        if ordinary is None or clipped is None or not same:
            return None
        return Rehearsal(n, ordinary, clipped, self.handed_over, self.segments, self.passages)


__all__ = ["HandedOver", "Passages", "Passed", "Rehearsal"]
