"""A plan: what was chosen at every site of a graph, over what, and what it costs.

Promises: each decision keeps every alternative, with its predicted cost or the reason why it was refused; what follows
from all of them together (seconds, the peak of a step, what runs a second time) is read off the plan. A memory budget
is kept as `choose` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from perexfx.ir.alternative import Alternative
from perexfx.ir.factors import Signature
from perexfx.ir.rule import Fitted
from perexfx.ir.site import Key
from perexfx.ir.strategy import REWEIGHT, Strategy
from perexfx.planning.knapsack import Choice, choose, leanest, total_bytes
from perexfx.planning.reruns import Cut, Rerun, cuts_of, reruns_of
from perexfx.sites import Segment, numbers_of


@dataclass(frozen=True)
class Decision:
    """What was chosen for one operand of a site, and over what.

    Attributes:
        site: The site's name.
        operand: The operand's name.
        kind: Kind of the rule at these shapes.
        signature: Sizes of its factors.
        chosen: The alternative taken.
        alternatives: All of them, in the order of the strategies.
        reason: Why there was no choice: "forced by strategy=", "joined with ...", or "".
        own_seconds: Predicted time of what the rule does beyond an ordinary backward, whatever the strategy.
        ordinary_seconds: Predicted time of the gradient over all examples together, in an ordinary backward.
    """

    site: str
    operand: str
    kind: str
    signature: Signature
    chosen: Alternative
    alternatives: tuple[Alternative, ...]
    reason: str = ""
    own_seconds: float = 0.0
    ordinary_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted time, the rule's own included."""
        return self.chosen.seconds + self.own_seconds

    @property
    def has_choice(self) -> bool:
        """Whether it might have been another."""
        return not self.reason or self.reason.endswith("does not apply")

    @property
    def candidates(self) -> tuple[Alternative, ...]:
        """What might have been chosen for this operand by itself."""
        if not self.has_choice:
            return (self.chosen,)
        return tuple(a for a in self.alternatives if a.cost is not None and not a.is_second_run)

    @property
    def reweighted(self) -> Alternative | None:
        """What might have been chosen for the operands of a whole segment."""
        found = (a for a in self.alternatives if a.cost is not None and a.is_second_run)
        return next(found, None) if self.has_choice else None

    @property
    def runner_up(self) -> Alternative | None:
        """The fastest alternative that was not taken; what goes for whole segments is none."""
        rivals = [a for a in self.alternatives if a.cost and a is not self.chosen and not a.is_second_run]
        return min(rivals, key=lambda a: a.seconds, default=None)


class Footprint(Protocol):
    """Predicts the memory of plans."""

    def bytes_added(self, plan: Plan, choice: Choice) -> int:
        """By how many bytes the peak of a step grows with a choice: one alternative per decision of the plan."""
        ...

    def ordinary_bytes(self, plan: Plan) -> int | None:
        """The peak of an ordinary step; None where it is not known."""
        ...


@dataclass(frozen=True)
class Plan:
    """site -> strategy, with predicted seconds and bytes, and why each rival lost.

    Attributes:
        batch_size: The number of examples it was made for.
        decisions: One per operand of each site, in graph order.
        fitted: Site name -> the rule that covers its shapes, and the shapes.
        machine: Name of the machine profile.
        memory_budget: The bound it was made under, in bytes.
        channels_last: The regions, by number, whose images lie with their channels last.
        segments: The parts of the graph that may run a second time.
        footprint: Predicts its memory; None: by what the choices hold together, which is too much.
    """

    batch_size: int
    decisions: tuple[Decision, ...]
    fitted: Mapping[str, Fitted] = field(repr=False)
    machine: str
    memory_budget: int | None = None
    channels_last: frozenset[int] = frozenset()
    segments: tuple[Segment, ...] = field(default=(), repr=False)
    footprint: Footprint | None = field(default=None, repr=False, compare=False)

    @cached_property
    def strategies(self) -> Mapping[Key, Strategy]:
        """(site, operand) -> strategy."""
        return {(d.site, d.operand): d.chosen.strategy for d in self.decisions}

    @cached_property
    def reweighted(self) -> frozenset[Key]:
        """The operands, as (site, operand), whose clipped sums come from a second backward."""
        return frozenset(key for key, strategy in self.strategies.items() if strategy.name == REWEIGHT)

    @cached_property
    def reruns(self) -> tuple[Rerun, ...]:
        """What is run a second time for them, in graph order."""
        return reruns_of(self.reweighted, self.segments)

    @cached_property
    def cuts(self) -> Mapping[int, Cut]:
        """Number of a segment -> the cut before it, where that is anything to a rerun."""
        return cuts_of(self.reruns, self.segments)

    @cached_property
    def left_users(self) -> Mapping[Key, tuple[str, int]]:
        """(site, operand) -> the value whose Gram matrices it shares with other sites, and how many take them."""
        found = {
            (d.site, d.operand): self.fitted[d.site].shares for d in self.decisions if d.chosen.strategy.name == "gram"
        }
        users = Counter(found.values())
        return {key: (read, users[read]) for key, read in found.items() if read and users[read] > 1}

    @property
    def seconds(self) -> float:
        """Predicted time of all norms and clipped sums."""
        return sum(decision.seconds for decision in self.decisions)

    @property
    def ordinary_seconds(self) -> float:
        """Predicted time of the same parameters' gradients in an ordinary backward."""
        return sum(decision.ordinary_seconds for decision in self.decisions)

    @property
    def ordinary_bytes(self) -> int | None:
        """Predicted peak memory of an ordinary step; None where it is not known."""
        return None if self.footprint is None else self.footprint.ordinary_bytes(self)

    @cached_property
    def bytes_added(self) -> int:
        """By how many bytes the peak memory of a step is predicted to grow; below zero where it shrinks."""
        return self._added([decision.chosen for decision in self.decisions])

    def bytes_added_with(self, decision: Decision, other: Alternative) -> int:
        """The same with another alternative in place of one decision's."""
        return self._added([other if d is decision else d.chosen for d in self.decisions])

    def within(self, memory_budget: int) -> Plan:
        """The plan of this kind that keeps a budget, in bytes that the peak may grow by.

        Raises:
            BudgetError: None does.
        """
        return self._with(choose(self._rows, memory_budget, self._added, self._bundles), memory_budget)

    def leanest(self) -> Plan:
        """The plan of this kind that adds least to the peak."""
        found = leanest(self._rows, self._added, self._bundles)
        return self._with(found, self._added(found))

    @property
    def _rows(self) -> list[tuple[Alternative, ...]]:
        return [decision.candidates for decision in self.decisions]

    @property
    def _bundles(self) -> list[dict[int, Alternative]]:
        """Per segment the alternatives that go together, by the number of their row.

        None at all where the memory is not known: what second runs take must be.
        """
        if self.ordinary_bytes is None:
            return []
        numbers = numbers_of(self.segments)
        found: list[dict[int, Alternative]] = [{} for _ in self.segments]
        for row, decision in enumerate(self.decisions):
            if decision.reweighted is not None:
                found[numbers[decision.site]][row] = decision.reweighted
        return [bundle for bundle in found if bundle]

    def _with(self, choice: Choice, memory_budget: int) -> Plan:
        decisions = tuple(replace(d, chosen=taken) for d, taken in zip(self.decisions, choice, strict=True))
        return replace(self, decisions=decisions, memory_budget=memory_budget)

    def _added(self, choice: Choice) -> int:
        return total_bytes(choice) if self.footprint is None else self.footprint.bytes_added(self, choice)

    def __getitem__(self, site: str) -> str:
        """Name of a site's strategy."""
        for decision in self.decisions:
            if decision.site == site:
                return decision.chosen.strategy.name
        raise KeyError(site)
