"""The strategy report: what the planner chose at every site, at what predicted cost, and over what.

Promises: the same plan gives the same text; every site of the plan has a line; nothing is measured or computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from perexfx.ir.alternative import Alternative
from perexfx.ir.errors import ArgumentError
from perexfx.ir.site import Site
from perexfx.plan import Decision, Plan
from perexfx.state import PerExample, Settings

_MEGABYTE = 1e6
_HEADINGS = ("site", "kind", "shapes", "strategy", "ms", "MB", "next best", "why not")
_RIGHT_ALIGNED = ("ms", "MB")


@dataclass(frozen=True)
class Row:
    """One site.

    Attributes:
        site: Its name.
        kind: Kind of layer.
        shapes: Sizes in words.
        strategy: What was chosen.
        seconds: Predicted, for all its parameters.
        bytes_held: Predicted, from its backward until the clip node.
        next_best: The strategy that came second; "-" where none applies.
        why_not: Why that one lost, or why no other applies.
    """

    site: str
    kind: str
    shapes: str
    strategy: str
    seconds: float
    bytes_held: int
    next_best: str
    why_not: str

    def cells(self) -> tuple[str, ...]:
        """As printed."""
        return (
            self.site,
            self.kind,
            self.shapes,
            self.strategy,
            f"{self.seconds * 1e3:.3f}",
            f"{self.bytes_held / _MEGABYTE:.2f}",
            self.next_best,
            self.why_not,
        )


@dataclass(frozen=True)
class Report:
    """What was decided for one batch size. `str(report)` is a table.

    Attributes:
        title: Sites, batch size, clipping and machine profile.
        totals: Predicted seconds and bytes.
        rows: A line per site, in graph order.
    """

    title: str
    totals: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = [_HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(len(line[column]) for line in table) for column in range(len(_HEADINGS))]
        lines = [_aligned(line, widths) for line in table]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, self.totals, "", lines[0], rule, *lines[1:]])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if heading in _RIGHT_ALIGNED else cell.ljust(width)
        for cell, width, heading in zip(line, widths, _HEADINGS, strict=True)
    ]
    return "  ".join(cells).rstrip()


def report(gm: nn.Module) -> Report:
    """What the planner decided for the last batch, or ahead of time for the example inputs.

    Args:
        gm: A transformed module.

    Raises:
        ArgumentError: It is not a transformed module, or there is no plan yet.
    """
    state = getattr(gm, "perexfx", None)
    if not isinstance(state, PerExample):
        raise ArgumentError(f"`gm` should come from `perexfx.transform`. Found {type(gm).__name__}.")
    plan = state.plan
    if plan is None:
        raise ArgumentError(
            "There is no plan yet: without example inputs it is made at the first batch. "
            "Call the module once, or pass `example_inputs` to `transform`."
        )
    rows = tuple(_row(site, plan) for site in state.sites)
    return Report(_title(state.settings, plan), _totals(plan) + _formats(state, plan), rows)


def _title(settings: Settings, plan: Plan) -> str:
    sites = len({decision.site for decision in plan.decisions})
    if settings.clip_norm is None:
        clipping = "nothing is clipped"
    else:
        kind = settings.clipping if isinstance(settings.clipping, str) else "user-defined"
        clipping = f"{kind.replace('_', '-')} clipping, clip_norm {settings.clip_norm:g}"
    return f"perexfx strategy report: {sites} sites, batch of {plan.batch_size}, {clipping}"


def _totals(plan: Plan) -> str:
    budget = "no memory budget"
    if plan.memory_budget is not None:
        budget = f"memory budget {plan.memory_budget / _MEGABYTE:.2f} MB"
    return (
        f"predicted by the {plan.machine}: {plan.seconds * 1e3:.3f} ms for all norms and clipped sums, "
        f"{plan.bytes_added / _MEGABYTE:+.2f} MB at the peak of a step ({budget})"
    )


def _formats(state: PerExample, plan: Plan) -> str:
    """A line on the images whose memory format was changed."""
    sites = [site.name for at in sorted(plan.channels_last) for site in state.regions[at].sites]
    if not sites:
        return ""
    others = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
    return f"\nimages lie with their channels last at {sites[0]}{others}"


def _row(site: Site, plan: Plan) -> Row:
    decisions = [decision for decision in plan.decisions if decision.site == site.name]
    first = decisions[0]
    next_best, why_not = _rival(first, plan)
    if first.reason.endswith("does not apply"):
        why_not = f"{why_not}; {first.reason}"
    if misfit := plan.fitted[site.name].misfit:
        why_not = f"{why_not}; {misfit}"
    return Row(
        site=site.name,
        kind=first.kind,
        shapes=first.signature.describe(),
        strategy=first.chosen.strategy.name,
        seconds=sum(decision.seconds for decision in decisions),
        bytes_held=sum(decision.chosen.bytes_held for decision in decisions),
        next_best=next_best,
        why_not=why_not,
    )


def _rival(decision: Decision, plan: Plan) -> tuple[str, str]:
    if decision.reason.startswith(("joined", "pulled")):
        return "-", decision.reason
    rival = decision.runner_up
    if rival is None:
        refused = next((a for a in decision.alternatives if a.refusal), None)
        return "-", "only choice" if refused is None else f"only choice ({refused.strategy.name}: {refused.refusal})"
    return rival.strategy.name, _comparison(rival, decision, plan)


def _comparison(rival: Alternative, decision: Decision, plan: Plan) -> str:
    """By how much a rival lost, or why it could not win."""
    chosen = decision.chosen
    ratio = rival.seconds / chosen.seconds if chosen.seconds else float("inf")
    times = f"{(rival.seconds - chosen.seconds) * 1e3:+.3f} ms ({ratio:.2f}x)"
    if rival.seconds >= chosen.seconds:
        return times
    if decision.reason:
        return f"{times}, but {chosen.strategy.name} was asked for"
    peak = plan.bytes_added_with(decision, rival)
    return f"{times}, but {peak / _MEGABYTE:+.2f} MB at the peak"
