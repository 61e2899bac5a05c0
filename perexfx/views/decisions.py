"""What a plan decided, as values: every alternative of every site, and where the plan would be another.

Promises: the same plan gives equal values; every site of the plan has a row, every strategy an option with its
predicted cost or the reason why it was not taken. Nothing is measured or computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perexfx.ir.alternative import Alternative
from perexfx.ir.errors import BudgetError
from perexfx.ir.inputs import Inputs
from perexfx.ir.site import Key, Site
from perexfx.planning import Decision, Plan
from perexfx.runtime import Runtime
from perexfx.views.words import megabytes


@dataclass(frozen=True)
class Option:
    """One strategy for one operand of a site.

    Attributes:
        strategy: Its name.
        status: "chosen", "rejected" or "refused".
        seconds: Predicted; None where it is refused.
        bytes_held: Predicted, from the site's backward until the clip node; None where it is refused.
        why: By how much it lost, or why it does not apply; "" for the one chosen.
    """

    strategy: str
    status: str
    seconds: float | None
    bytes_held: int | None
    why: str


@dataclass(frozen=True)
class Choice:
    """One operand of a site.

    Attributes:
        operand: Its name.
        parameters: The parameters that it is made of.
        shapes: Sizes in words.
        strategy: What was chosen.
        seconds: Predicted, what the rule does itself included.
        own_seconds: Predicted, of that what the rule does whatever the strategy.
        ordinary_seconds: Predicted, of the ordinary gradient over all examples together.
        bytes_held: Predicted, from the site's backward until the clip node.
        reason: Why there was no choice; "" where there was.
        options: Every strategy, in the planner's order.
    """

    operand: str
    parameters: tuple[str, ...]
    shapes: str
    strategy: str
    seconds: float
    own_seconds: float
    ordinary_seconds: float
    bytes_held: int
    reason: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Row:
    """One site.

    Attributes:
        site: Its name.
        kind: Kind of layer.
        shapes: Sizes in words.
        strategy: What was chosen for its first operand.
        seconds: Predicted, for all its operands.
        ordinary_seconds: Predicted, of ordinary gradients of the same parameters.
        bytes_held: Predicted, from its backward until the clip node.
        next_best: The strategy that came second; "-" where none applies.
        why_not: Why that one lost, or why no other applies.
        module: Path of the module that it is in.
        source: `file.py:line` of the user's code, where that is known.
        misfit: Why the rule of its kind does not cover its shapes, so that the fallback does; "" where it does.
        choices: One per operand.
        measured_seconds: Of its strategies, by `perexfx.profile`; None before.
        measured_bytes: What it held, by `perexfx.profile`; None before.
    """

    site: str
    kind: str
    shapes: str
    strategy: str
    seconds: float
    ordinary_seconds: float
    bytes_held: int
    next_best: str
    why_not: str
    module: str
    source: str
    misfit: str
    choices: tuple[Choice, ...]
    measured_seconds: float | None = None
    measured_bytes: int | None = None


def rows_of(sites: Sequence[Site], plan: Plan) -> tuple[Row, ...]:
    """A row per site, in graph order."""
    return tuple(_row(site, plan) for site in sites)


def _row(site: Site, plan: Plan) -> Row:
    decisions = [decision for decision in plan.decisions if decision.site == site.name]
    first = decisions[0]
    next_best, why_not = _rival(first, plan)
    if first.reason.endswith("does not apply"):
        why_not = f"{why_not}; {first.reason}"
    if misfit := plan.fitted[site.name].misfit:
        why_not = f"{why_not}; {misfit}"
    parameters = {operand.name: operand.expression.parameters for operand in site.operands}
    return Row(
        site=site.name,
        kind=first.kind,
        shapes=first.signature.describe(),
        strategy=first.chosen.strategy.name,
        seconds=sum(decision.seconds for decision in decisions),
        ordinary_seconds=sum(decision.ordinary_seconds for decision in decisions),
        bytes_held=sum(decision.chosen.bytes_held for decision in decisions),
        next_best=next_best,
        why_not=why_not,
        module=site.place.module,
        source=site.place.source,
        misfit=misfit,
        choices=tuple(_choice(decision, parameters[decision.operand], plan) for decision in decisions),
    )


def _choice(decision: Decision, parameters: tuple[str, ...], plan: Plan) -> Choice:
    return Choice(
        operand=decision.operand,
        parameters=parameters,
        shapes=decision.signature.describe(),
        strategy=decision.chosen.strategy.name,
        seconds=decision.seconds,
        own_seconds=decision.own_seconds,
        ordinary_seconds=decision.ordinary_seconds,
        bytes_held=decision.chosen.bytes_held,
        reason=decision.reason,
        options=tuple(_option(alternative, decision, plan) for alternative in decision.alternatives),
    )


def _option(alternative: Alternative, decision: Decision, plan: Plan) -> Option:
    name = alternative.strategy.name
    if alternative.cost is None:
        return Option(name, "refused", None, None, alternative.refusal)
    is_chosen = alternative is decision.chosen
    why = "" if is_chosen else _comparison(alternative, decision, plan)
    return Option(name, "chosen" if is_chosen else "rejected", alternative.seconds, alternative.bytes_held, why)


def _rival(decision: Decision, plan: Plan) -> tuple[str, str]:
    if _has_no_choice(decision):
        return "-", decision.reason
    rival = decision.runner_up
    if rival is None:
        refused = next((a for a in decision.alternatives if a.refusal), None)
        return "-", "only choice" if refused is None else f"only choice ({refused.strategy.name}: {refused.refusal})"
    return rival.strategy.name, _comparison(rival, decision, plan)


def _has_no_choice(decision: Decision) -> bool:
    """Whether per-example gradients must be formed, whatever that takes."""
    return decision.reason.startswith(("joined", "pulled"))


def _comparison(rival: Alternative, decision: Decision, plan: Plan) -> str:
    """By how much a rival lost, or why it could not win."""
    chosen = decision.chosen
    ratio = rival.seconds / chosen.seconds if chosen.seconds else float("inf")
    times = f"{(rival.seconds - chosen.seconds) * 1e3:+.3f} ms ({ratio:.2f}x)"
    if _has_no_choice(decision):
        return f"{times}; {decision.reason}"
    if rival.seconds >= chosen.seconds:
        return times
    if decision.reason == "forced":
        return f"{times}, but {chosen.strategy.name} was asked for"
    peak = plan.bytes_added_with(decision, rival)
    return f"{times}, but {megabytes(peak, is_signed=True)} MB at the peak"


# Where the plan would be another


@dataclass(frozen=True)
class Flip:
    """A site whose strategy depends on the batch size.

    Attributes:
        site: Its name, and that of the operand where it is not the first.
        ranges: `(first, last, strategy)` over the batch sizes that were tried, in order.
    """

    site: str
    ranges: tuple[tuple[int, int, str], ...]

    def __str__(self) -> str:
        words = [f"{name} at {low}" if low == high else f"{name} at {low} to {high}" for low, high, name in self.ranges]
        return ", ".join(words)


@dataclass(frozen=True)
class BudgetStep:
    """The plan under a smaller memory budget.

    Attributes:
        memory_budget: The least budget that this plan keeps, in bytes.
        bytes_added: What it adds to the peak of a step.
        seconds: Predicted, for all norms and clipped sums.
        changes: Site -> strategy, where another than without that budget.
    """

    memory_budget: int
    bytes_added: int
    seconds: float
    changes: tuple[tuple[str, str], ...]


BATCH_SIZES_BEYOND = 4
"""Batch sizes are tried up to so many times the plan's, in powers of two."""


def sizes_to_try(n: int) -> list[int]:
    """Powers of two, and the plan's own."""
    powers = [1]
    while powers[-1] < BATCH_SIZES_BEYOND * n:
        powers.append(2 * powers[-1])
    return sorted({*powers, n})


def plans_for(runtime: Runtime, kind: Inputs, sizes: Sequence[int]) -> dict[int, Plan | None]:
    """Batch size -> the plan for one kind of input; None where none fits the memory budget."""
    found: dict[int, Plan | None] = {}
    with runtime.set_aside():
        for n in sizes:
            try:
                found[n] = runtime.prepare(kind, n)
            except BudgetError:
                found[n] = None
    return found


def decided(plan: Plan) -> dict[Key, str]:
    """(site, operand) -> what it is called: the first operand of every site, and all others that have a choice."""
    firsts = {decision.site: decision.operand for decision in reversed(plan.decisions)}
    return {
        (d.site, d.operand): d.site if d.operand == firsts[d.site] else f"{d.site} ({d.operand})"
        for d in plan.decisions
        if d.operand == firsts[d.site] or len(d.candidates) > 1
    }


def flips_of(plans: dict[int, Plan | None]) -> tuple[Flip, ...]:
    """The sites whose strategy is not the same for all batch sizes that have a plan."""
    fitting = {n: plan for n, plan in sorted(plans.items()) if plan is not None}
    found = []
    for key, site in decided(next(iter(fitting.values()))).items() if fitting else ():
        ranges: list[tuple[int, int, str]] = []
        for n, plan in fitting.items():
            name = plan.strategies[key].name
            if ranges and ranges[-1][2] == name:
                ranges[-1] = (ranges[-1][0], n, name)
            else:
                ranges.append((n, n, name))
        if len(ranges) > 1:
            found.append(Flip(site, tuple(ranges)))
    return tuple(found)


CHOICES = 100
"""Decisions of a plan up to which smaller budgets are tried: to choose under one takes seconds beyond."""


def budget_steps(plan: Plan) -> tuple[BudgetStep, ...] | None:
    """The plan below its own memory: the next one, one half way down, and under the least budget that there can be.

    None: they were not tried.
    """
    if sum(len(decision.candidates) > 1 for decision in plan.decisions) > CHOICES:
        return None
    highest = plan.bytes_added
    lowest = max(0, plan.leanest().bytes_added)
    if lowest >= highest:
        return ()
    tried = [plan.within(budget) for budget in (highest - 1, (highest + lowest) // 2, lowest)]
    return tuple(dict.fromkeys(_budget_step(other, plan) for other in tried))


def _budget_step(other: Plan, plan: Plan) -> BudgetStep:
    names = decided(plan)
    changes = {names[d.site, d.operand]: d.chosen.strategy.name for d in _differing(other, plan)}
    return BudgetStep(max(0, other.bytes_added), other.bytes_added, other.seconds, tuple(changes.items()))


def _differing(other: Plan, plan: Plan) -> list[Decision]:
    pairs = zip(other.decisions, plan.decisions, strict=True)
    return [new for new, old in pairs if new.chosen.strategy is not old.chosen.strategy]
