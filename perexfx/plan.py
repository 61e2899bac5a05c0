"""Planning: sites, strategies, machine and memory budget to a plan, from shapes alone.

Promises: without a budget the plan takes the least predicted time at every site; a budget is kept as `choose` says. A
plan is the same for the same shapes. Each decision keeps every alternative, with its predicted cost or the reason why
it was refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from perexfx.choose import Choice, choose, leanest, total_bytes
from perexfx.ir.alternative import Alternative
from perexfx.ir.cost import Cost
from perexfx.ir.errors import ArgumentError, StrategyError
from perexfx.ir.factors import GradientSignature, Signature
from perexfx.ir.machine import CostModel
from perexfx.ir.ordinary import ordinary_gradient
from perexfx.ir.refusal import Refusal
from perexfx.ir.rule import Fitted
from perexfx.ir.site import Site, are_joined, grouped
from perexfx.ir.strategy import Strategy
from perexfx.segments import Cut, Key, Rerun, Segment, cuts_of, reruns_of

REWEIGHT = "reweight"
"""Name of the strategy whose clipped sums come from a second backward."""


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
        return tuple(a for a in self.alternatives if a.cost is not None and a.strategy.name != REWEIGHT)

    @property
    def reweighted(self) -> Alternative | None:
        """What might have been chosen for the operands of a whole segment."""
        found = (a for a in self.alternatives if a.cost is not None and a.strategy.name == REWEIGHT)
        return next(found, None) if self.has_choice else None

    @property
    def runner_up(self) -> Alternative | None:
        """The fastest alternative that was not taken; what goes for whole segments is none."""
        rivals = [a for a in self.alternatives if a.cost is not None and a is not self.chosen]
        rivals = [a for a in rivals if a.strategy.name != REWEIGHT]
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
    def _bundles(self) -> list[dict[int, Alternative] | None]:
        """Per segment the alternatives that go together, by the number of their row; None where it cannot run again."""
        numbers = {site: at for at, segment in enumerate(self.segments) for site in segment.sites}
        found: list[dict[int, Alternative]] = [{} for _ in self.segments]
        for row, decision in enumerate(self.decisions):
            if decision.reweighted is not None:
                found[numbers[decision.site]][row] = decision.reweighted
        return [own if own or s.is_bridge else None for own, s in zip(found, self.segments, strict=True)]

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


class Alternatives:
    """Every strategy on factors of one size; computed once per size.

    Args:
        strategies: To choose from; earlier ones win ties.
        reweight: Makes of a strategy the one that takes its norms, and clipped sums from a second backward.
        machine: Predicts seconds.
        itemsize: Bytes per element.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        reweight: Callable[[Strategy], Strategy],
        machine: CostModel,
        itemsize: int,
    ) -> None:
        self.strategies, self.reweight = strategies, reweight
        self.machine, self.itemsize = machine, itemsize
        self._known: dict[Signature, tuple[Alternative, ...]] = {}

    def of(self, signature: Signature) -> tuple[Alternative, ...]:
        """All of them, in the order of the strategies."""
        if signature not in self._known:
            refusals = {strategy: strategy.refuses(signature) for strategy in self.strategies}
            costs = {s: s.cost(signature, self.itemsize) for s, reason in refusals.items() if reason is None}
            seconds = self.machine.predict(costs, signature)
            self._known[signature] = tuple(
                Alternative(s, seconds[s], costs[s]) if s in costs else Alternative(s, refusal=reason or "")
                for s, reason in refusals.items()
            )
        return self._known[signature]

    def norms_alone(self, signature: Signature) -> Alternative | None:
        """The fastest of those that hold factors for the clip node, which a second backward can do without."""
        holding = [a for a in self.of(signature) if a.cost is not None and a.cost.holds_factors]
        return None if isinstance(signature, GradientSignature) else min(holding, key=lambda a: a.seconds, default=None)

    def reweighted(self, signature: Signature, segment: Segment | None, share: int, joined: str) -> Alternative:
        """Norms alone, with a share of the second run of a segment.

        Args:
            signature: Sizes of the factors.
            segment: What is run a second time; None: the site is in no segment.
            share: Among how many operands the time of that run is divided.
            joined: Why per-example gradients must be formed; "" where they need not.
        """
        norms = self.norms_alone(signature)
        if refusal := _no_second_run(segment, norms, joined):
            return Alternative(self.reweight(self.strategies[0]), refusal=refusal)
        assert norms is not None
        assert segment is not None
        strategy = self.reweight(norms.strategy)
        cost = replace(strategy.cost(signature, self.itemsize), bytes_summing=segment.cost.bytes_summing)
        return Alternative(strategy, norms.seconds + self.machine.seconds(segment.cost) / share, cost)

    def least_seconds(self, signature: Signature) -> float:
        """Of the best strategy."""
        return min(alternative.seconds for alternative in self.of(signature))

    def ordinary_seconds(self, signature: Signature) -> float:
        """Of the gradient over all examples together, in an ordinary backward."""
        return self.machine.seconds(Cost(ordinary_gradient(signature, self.itemsize), 0))

    def own_seconds(self, fitted: Fitted) -> float:
        """What a rule does beyond an ordinary backward, whatever the strategy."""
        return self.machine.seconds(Cost(fitted.rule.own_work(fitted.geometry, self.itemsize), 0))


def _no_second_run(segment: Segment | None, norms: Alternative | None, joined: str) -> str:
    """Why an operand's clipped sum cannot come from a second backward, or ""."""
    if joined:
        return joined
    if norms is None:
        return "its gradients are held as they are formed"
    return "no single value carries the gradients of what lies above it" if segment is None else segment.refusal


def make_plan(
    sites: Sequence[Site],
    fitted: Mapping[str, Fitted],
    alternatives: Alternatives,
    *,
    forced: str | Mapping[str, str] = "auto",
    channels_last: frozenset[int] = frozenset(),
    segments: Sequence[Segment] = (),
    footprint: Footprint | None = None,
) -> Plan:
    """The cheapest strategy for every operand of every site.

    Args:
        sites: In graph order.
        fitted: Site name -> the site at its shapes.
        alternatives: The strategies to choose from.
        forced: "auto", one strategy's name, or {site name: strategy name}.
        channels_last: The regions that use that format.
        segments: The parts of the graph that may run a second time.
        footprint: Predicts the plan's memory.

    Raises:
        StrategyError: A forced strategy does not exist, or does not apply.
    """
    check_forced(sites, alternatives.strategies, forced)
    rows, segments = _with_second_runs(_rows(sites, fitted, alternatives, forced), alternatives, segments)
    _check_applicable(rows, forced)
    decisions = []
    for row in rows:
        chosen = min(row.candidates, key=lambda a: a.seconds)
        found, is_first = fitted[row.site.name], row.operand == row.site.operands[0].name
        own = alternatives.own_seconds(found) if is_first else 0.0
        name, kind = row.site.name, found.rule.kind
        ordinary = alternatives.ordinary_seconds(row.signature)
        decisions.append(
            Decision(name, row.operand, kind, row.signature, chosen, row.alternatives, row.reason, own, ordinary)
        )
    n = next(iter(fitted.values())).geometry.n if fitted else 0
    return Plan(
        n,
        tuple(decisions),
        fitted,
        alternatives.machine.name,
        channels_last=channels_last,
        segments=tuple(segments),
        footprint=footprint,
    )


@dataclass(frozen=True)
class _Row:
    """One operand of one site, before a choice is made.

    Attributes:
        wanted: Name of the strategy that the user asks for.
        joined: Why its per-example gradients must be formed; "" where they need not.
    """

    site: Site
    operand: str
    signature: Signature
    alternatives: tuple[Alternative, ...]
    wanted: str | None
    joined: str

    @property
    def forced(self) -> Alternative | None:
        """The alternative asked for, where it applies."""
        return next((a for a in self.alternatives if a.strategy.name == self.wanted and a.cost), None)

    @property
    def candidates(self) -> list[Alternative]:
        """What may be chosen."""
        if self.joined:
            return [a for a in self.alternatives if a.strategy.name == "materialize"]
        if self.forced:
            return [self.forced]
        return [a for a in self.alternatives if a.cost and a.strategy.name != REWEIGHT]

    @property
    def reason(self) -> str:
        """Why there is no choice."""
        if self.joined:
            return self.joined
        if self.wanted is None:
            return ""
        return "forced" if self.forced else f"{self.wanted} does not apply"


def _rows(
    sites: Sequence[Site],
    fitted: Mapping[str, Fitted],
    alternatives: Alternatives,
    forced: str | Mapping[str, str],
) -> list[_Row]:
    """What there is to choose from by itself."""
    joined, rows = _joined(sites), []
    for site in sites:
        for operand in site.operands:
            signature = fitted[site.name].signatures[operand.name]
            wanted = _wanted(site, forced)
            if operand is not site.operands[0] and (wanted != REWEIGHT or not alternatives.norms_alone(signature)):
                wanted = None
            rows.append(_Row(site, operand.name, signature, alternatives.of(signature), wanted, joined[site.name]))
    return rows


def _with_second_runs(
    rows: Sequence[_Row], alternatives: Alternatives, segments: Sequence[Segment]
) -> tuple[list[_Row], list[Segment]]:
    """And what goes for a whole segment; its operands share the time, those asked for or else all that may."""
    by_site = {site: segment for segment in segments for site in segment.sites}
    asked, able, factored = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        segment, norms = by_site.get(row.site.name), alternatives.norms_alone(row.signature)
        if segment is None:
            continue
        factored[segment.exit] += norms is not None
        if not _no_second_run(segment, norms, row.joined):
            able[segment.exit] += 1
            asked[segment.exit] += row.wanted == REWEIGHT
    found = []
    for row in rows:
        segment = by_site.get(row.site.name)
        share = 1 if segment is None else asked[segment.exit] or able[segment.exit]
        own = alternatives.reweighted(row.signature, segment, share, row.joined)
        found.append(replace(row, alternatives=(*row.alternatives, own)))
    return found, [replace(s, is_bridge=not s.refusal and not factored[s.exit]) for s in segments]


def _joined(sites: Sequence[Site]) -> dict[str, str]:
    """Site name -> why its per-example gradients must be formed; "" where they need not."""
    reasons = {}
    for members in grouped(sites).values():
        must = are_joined(members)
        for site in members:
            others = ", ".join(other.name for other in members if other is not site)
            shared = f"joined with {others}" if others else "pulled back to its parameters"
            reasons[site.name] = shared if must else ""
    return reasons


def _wanted(site: Site, forced: str | Mapping[str, str]) -> str | None:
    name = forced if isinstance(forced, str) else forced.get(site.name, "auto")
    return None if name == "auto" else name


def check_forced(sites: Sequence[Site], strategies: Sequence[Strategy], forced: str | Mapping[str, str]) -> None:
    """That every strategy and site named by the user exists.

    Raises:
        StrategyError: One does not.
    """
    known = ["auto", *(strategy.name for strategy in strategies), REWEIGHT]
    if not isinstance(forced, str | Mapping):
        raise ArgumentError(
            f"`strategy` should be one of {', '.join(known)}, or a dict from site to strategy. Found {forced!r}."
        )
    names = [site.name for site in sites]
    asked = {"": forced} if isinstance(forced, str) else forced
    refusals = [
        Refusal(f"There is no strategy {name!r}.", f"The strategies are {', '.join(known)}.")
        for name in asked.values()
        if name not in known
    ]
    refusals += [
        Refusal(f"There is no site {site!r}.", f"The sites are {', '.join(names)}.")
        for site in asked
        if site and site not in names
    ]
    if refusals:
        raise StrategyError(refusals)


def _check_applicable(rows: Sequence[_Row], forced: str | Mapping[str, str]) -> None:
    """A strategy asked for at one site must apply there; one asked for everywhere, at some site at least."""
    impossible = [row for row in rows if row.wanted and (row.forced is None or row.joined)]
    if isinstance(forced, str) and any(row.wanted and row.forced and not row.joined for row in rows):
        return
    refusals = []
    for row in impossible:
        refusal = next(a.refusal for a in row.alternatives if a.strategy.name == row.wanted)
        if row.joined and row.wanted == "materialize":
            continue
        applicable = [a.strategy.name for a in row.alternatives if a.cost] if not row.joined else ["materialize"]
        refusals.append(
            Refusal(
                what=f"Strategy {row.wanted!r} does not apply to site `{row.site.name}` at {row.site.place}: "
                f"{row.joined or refusal}.",
                why=f"The site is {row.site.kind}, {row.signature.describe()}.",
                remedy=f"Applicable are {', '.join(applicable)}.",
                place=row.site.place,
            )
        )
    if refusals:
        raise StrategyError(refusals)
