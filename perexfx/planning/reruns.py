"""Reruns: what a plan has run a second time, and what the cuts between segments are to that.

Promises: they follow from the operands that are asked for alone; no two are beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from perexfx.ir.site import Key
from perexfx.sites import Segment, numbers_of


@dataclass(frozen=True)
class Rerun:
    """Segments that are run a second time, for the clipped sums of some of their operands.

    Attributes:
        first: Number of its first segment.
        last: Number of its last segment.
        keys: The operands, as (site, operand).
    """

    first: int
    last: int
    keys: frozenset[Key]


@dataclass(frozen=True)
class Cut:
    """What the value between two segments is to the reruns of a plan.

    Attributes:
        keeps: The values that the segment after it reads, for a rerun.
        begins: Whether a rerun begins here.
        modules: Paths of the modules that this calls.
        ends: Whether one ends here.
    """

    keeps: tuple[str, ...] = ()
    begins: bool = False
    modules: tuple[str, ...] = ()
    ends: bool = False


def reruns_of(keys: Iterable[Key], segments: Sequence[Segment]) -> tuple[Rerun, ...]:
    """What must be run a second time for some operands: segments beside each other together, bridges between included.

    Args:
        keys: The operands, as (site, operand).
        segments: All of the graph.
    """
    numbers = numbers_of(segments)
    wanted: dict[int, set[Key]] = {}
    for key in keys:
        wanted.setdefault(numbers[key[0]], set()).add(key)
    found: list[Rerun] = []
    for at in sorted(wanted):
        if found and all(segments[between].is_bridge for between in range(found[-1].last + 1, at)):
            found[-1] = Rerun(found[-1].first, at, found[-1].keys | wanted[at])
        else:
            found.append(Rerun(at, at, frozenset(wanted[at])))
    return tuple(found)


def cuts_of(reruns: Iterable[Rerun], segments: Sequence[Segment]) -> dict[int, Cut]:
    """Number of a segment -> the cut before it, where that is anything to a rerun; the last cut is after all."""
    found: dict[int, Cut] = {}
    for rerun in reruns:
        computed: set[str] = set()
        for at in range(rerun.first, rerun.last + 1):
            keeps = tuple(name for name in segments[at].given if name not in computed)
            found[at] = Cut(keeps)
            computed.update(segments[at].nodes)
        modules = (path for segment in segments[rerun.first : rerun.last + 1] for path in segment.modules)
        found[rerun.first] = replace(found[rerun.first], begins=True, modules=tuple(dict.fromkeys(modules)))
        found[rerun.last + 1] = Cut(ends=True)
    return found


__all__ = ["Cut", "Rerun", "cuts_of", "reruns_of"]
