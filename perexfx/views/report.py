"""The strategy report: what the planner chose at every site, at what predicted cost, and over what.

Promises: the same plan gives the same text, table, page and JSON; every site of the plan has a line, every strategy its
cost or the reason why it was not taken. Nothing is measured here; what `perexfx.profile` has measured is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from torch import nn

from perexfx.inspecting.profile import Profile
from perexfx.inspecting.proof import Proof
from perexfx.ir.errors import ArgumentError
from perexfx.rewrites import Rewritten
from perexfx.runtime import planned
from perexfx.views.cells import Cells
from perexfx.views.decisions import (
    CHOICES,
    BudgetStep,
    Flip,
    Row,
    budget_steps,
    flips_of,
    plans_for,
    rows_of,
    sizes_to_try,
)
from perexfx.views.pages import Viewed
from perexfx.views.rewriting import RewriteReport, report_of_rewrite
from perexfx.views.sweep import Sweep, sweep_of
from perexfx.views.words import aligned, clipping_in_words, counted, indented, megabytes, named

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group

_PREDICTED = ("site", "kind", "shapes", "strategy", "ms", "MB")
_MEASURED = ("ms measured", "MB measured")
_RIVAL = ("next best", "why not")


@dataclass(frozen=True)
class Report(Viewed):
    """What was decided for one batch size.

    `str(report)` is a table; `rich.print(report)` one in colours; a notebook shows the page that `to_html` writes.

    Attributes:
        batch_size: The number of examples.
        clipping: What becomes of the norms, in words.
        machine: The machine profile.
        memory_budget: In bytes; None: no bound.
        seconds: Predicted, for all norms and clipped sums.
        ordinary_seconds: Predicted, for ordinary gradients of the same parameters.
        bytes_added: By how many bytes the peak of a step is predicted to grow.
        ordinary_bytes: Predicted peak of an ordinary step; None where it is not known.
        channels_last: The sites whose images lie with their channels last.
        rows: One per site, in graph order.
        flips: The sites that have another strategy at other batch sizes.
        batch_sizes: The batch sizes that were tried for that.
        unfit: Those of them at which no plan fits the memory budget.
        budgets: What smaller memory budgets would change; None where there are too many decisions to try.
        proof: What `perexfx.verify` has proved; None before.
        measured: What `perexfx.profile` has measured; None before.
    """

    schema = "perexfx.report/1"
    template = "report"

    batch_size: int
    clipping: str
    machine: str
    memory_budget: int | None
    seconds: float
    ordinary_seconds: float
    bytes_added: int
    ordinary_bytes: int | None
    channels_last: tuple[str, ...]
    rows: tuple[Row, ...]
    flips: tuple[Flip, ...]
    batch_sizes: tuple[int, ...]
    unfit: tuple[int, ...]
    budgets: tuple[BudgetStep, ...] | None
    proof: str | None = None
    measured: str | None = None

    @property
    def title(self) -> str:
        """Sites, batch size and clipping."""
        return (
            f"perexfx strategy report: {counted(len(self.rows), 'site')}, batch of {self.batch_size}, {self.clipping}"
        )

    @property
    def totals(self) -> tuple[str, ...]:
        """Predicted time and memory against an ordinary step, and what else holds for all sites; a sentence each."""
        budget = "no memory budget"
        if self.memory_budget is not None:
            budget = f"memory budget {megabytes(self.memory_budget)} MB"
        against = ""
        if self.ordinary_bytes is not None:
            against = f", against {megabytes(self.ordinary_bytes)} MB of an ordinary one"
        peak = megabytes(self.bytes_added, is_signed=True)
        lines = [
            f"predicted by the {self.machine}: {self.seconds * 1e3:.3f} ms for all norms and clipped sums, where an "
            f"ordinary step takes {self.ordinary_seconds * 1e3:.3f} ms for the same gradients",
            f"predicted memory: {peak} MB at the peak of a step{against} ({budget})",
        ]
        if self.channels_last:
            first, *more = self.channels_last
            others = f" and {len(more)} more" if more else ""
            lines.append(f"images lie with their channels last at {first}{others}")
        if self.measured:
            lines.append(f"measured: {self.measured}")
        return tuple(lines)

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the table's columns."""
        is_measured = any(row.measured_seconds is not None for row in self.rows)
        return (*_PREDICTED, *(_MEASURED if is_measured else ()), *_RIVAL)

    def cells(self, row: Row) -> tuple[str, ...]:
        """A row as printed, a cell per heading."""
        known = {
            "site": row.site,
            "kind": row.kind,
            "shapes": row.shapes,
            "strategy": row.strategy,
            "ms": f"{row.seconds * 1e3:.3f}",
            "MB": megabytes(row.bytes_held, in_column=True),
            "ms measured": "" if row.measured_seconds is None else f"{row.measured_seconds * 1e3:.3f}",
            "MB measured": "" if row.measured_bytes is None else megabytes(row.measured_bytes, in_column=True),
            "next best": row.next_best,
            "why not": row.why_not,
        }
        return tuple(known[heading] for heading in self.headings)

    @property
    def _table(self) -> Cells:
        """A row per site."""
        rows = tuple(map(self.cells, self.rows))
        return Cells(self.title, self.headings, rows, self.numbers, ("strategy", "next best"))

    def labelled(self, row: Row) -> list[tuple[str, str]]:
        """The cells of a row with their headings."""
        return list(zip(self.headings, self.cells(row), strict=True))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Headings of columns that are aligned to the right."""
        return ("ms", "MB", *_MEASURED)

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that were chosen, in the order in which they appear."""
        return tuple(dict.fromkeys(row.strategy for row in self.rows))

    @property
    def flips_together(self) -> dict[str, list[str]]:
        """Strategies by batch size, in words -> the sites that have them."""
        found: dict[str, list[str]] = {}
        for flip in self.flips:
            found.setdefault(str(flip), []).append(flip.site)
        return found

    def __str__(self) -> str:
        table = aligned([self.headings, *map(self.cells, self.rows)], self.numbers, is_headed=True)
        return "\n".join([self.title, *self.totals, "", *table, *self._below()])

    def _below(self) -> list[str]:
        lines = []
        if self.flips or self.unfit:
            lines += ["", "other batch sizes (powers of two were tried)"]
        if self.flips:
            lines += indented(aligned([(named(sites), ranges) for ranges, sites in self.flips_together.items()]))
        if self.unfit:
            lines += indented([f"no plan fits the memory budget at {', '.join(map(str, self.unfit))}"])
        if self.budgets is None:
            lines += ["", self.untried]
        elif self.budgets:
            lines += ["", "smaller memory budgets"]
            lines += indented(aligned([self.budget_cells(step) for step in self.budgets]))
        if self.proof:
            lines += ["", self.proof]
        return lines

    def _tables_below(self) -> Iterator[Cells | str]:
        """What a terminal shows below the table."""
        if self.flips:
            rows = tuple((named(sites), ranges) for ranges, sites in self.flips_together.items())
            yield Cells("Other batch sizes (powers of two were tried)", ("sites", "strategy"), rows)
        if self.budgets is None:
            yield self.untried
        elif self.budgets:
            rows = tuple(map(self.budget_cells, self.budgets))
            yield Cells("Smaller memory budgets", ("peak", "time", "changes"), rows)
        if self.proof:
            yield self.proof

    def budget_cells(self, step: BudgetStep) -> tuple[str, str, str]:
        """Peak, time and changes under a smaller budget."""
        slower = step.seconds / self.seconds if self.seconds else 1.0
        changes = named([f"{site} {strategy}" for site, strategy in step.changes])
        return f"{megabytes(step.bytes_added, is_signed=True)} MB", f"{slower:.2f}x the ms", changes

    @property
    def untried(self) -> str:
        """Why there are no smaller budgets."""
        return (
            f"Smaller memory budgets were not tried for more than {CHOICES} decisions: "
            "`perexfx.transform(..., memory_budget=...)` tries one."
        )

    def explain(self, site: str) -> str:
        """Every strategy for every operand of a site: chosen, rejected by how much, or refused why.

        Raises:
            ArgumentError: There is no such site.
        """
        row = self.row(site)
        lines = [f"{row.site}: {row.kind}, {' '.join(part for part in (row.module, row.source) if part)}".rstrip(", ")]
        for choice in row.choices:
            named = ", ".join(choice.parameters)
            lines.append(
                f"{choice.operand} ({named}): {choice.shapes}" + (f"; {choice.reason}" if choice.reason else "")
            )
            cells = [
                (
                    option.strategy,
                    option.status,
                    "" if option.seconds is None else f"{option.seconds * 1e3:.3f} ms",
                    "" if option.bytes_held is None else f"{megabytes(option.bytes_held, in_column=True)} MB",
                    option.why,
                )
                for option in choice.options
            ]
            lines += indented(aligned(cells))
        return "\n".join(lines)

    def row(self, site: str) -> Row:
        """The row of a site.

        Raises:
            ArgumentError: There is no such site.
        """
        for row in self.rows:
            if row.site == site:
                return row
        raise ArgumentError(f"There is no site {site!r}. The sites are {', '.join(row.site for row in self.rows)}.")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        from perexfx.views.rich_tables import report_table  # noqa: PLC0415 (rich itself is what calls this)

        yield report_table(self._table, self.totals, list(self._tables_below()), options.max_width)


@overload
def report(gm: Rewritten) -> RewriteReport: ...  # pyright: ignore[reportOverlappingOverload] (a module of its own)


@overload
def report(gm: nn.Module) -> Report: ...


@overload
def report(gm: nn.Module, *, batch_sizes: Sequence[int]) -> Sweep: ...


def report(gm: nn.Module, *, batch_sizes: Sequence[int] | None = None) -> Report | Sweep | RewriteReport:
    """What the planner decided for the last batch, or ahead of time for the example inputs; or what a rewrite did.

    Args:
        gm: A transformed module, or a rewritten one, as of `perexfx.downsample`.
        batch_sizes: The plan for each of these instead, side by side: where strategies change, and what it costs.

    Returns:
        A `Report`; a `Sweep` over batch sizes; a `RewriteReport` of what a rewrite did. All print, and have `to_dict`,
        `to_json` and `to_html`.

    Raises:
        ArgumentError: It is not a transformed module, there is no plan yet, or a batch size is not positive.
    """
    if isinstance(gm, Rewritten):
        return report_of_rewrite(gm)
    runtime, plan, kind = planned(gm)
    if batch_sizes is not None:
        return sweep_of(runtime, kind, batch_sizes)
    sizes = sizes_to_try(plan.batch_size) if runtime.settings.cost_model == "profile" else []
    plans = plans_for(runtime, kind, sizes)
    found = Report(
        batch_size=plan.batch_size,
        clipping=clipping_in_words(runtime.settings),
        machine=plan.machine,
        memory_budget=plan.memory_budget,
        seconds=plan.seconds,
        ordinary_seconds=plan.ordinary_seconds,
        bytes_added=plan.bytes_added,
        ordinary_bytes=plan.ordinary_bytes,
        channels_last=tuple(site.name for at in sorted(plan.channels_last) for site in runtime.regions[at].sites),
        rows=rows_of(runtime.sites.sites, plan),
        flips=flips_of(plans),
        batch_sizes=tuple(sizes),
        unfit=tuple(n for n, other in plans.items() if other is None),
        budgets=budget_steps(plan),
    )
    at = kind, plan.batch_size
    return _with_results(found, runtime.notes.of(Proof).get(at), runtime.notes.of(Profile).get(at))


def _with_results(found: Report, proof: Proof | None, measured: Profile | None) -> Report:
    """The report with what was proved and measured of its plan."""
    if proof is not None:
        found = replace(found, proof=str(proof))
    if measured is not None:
        sites = {site.name: site for site in measured.sites}
        rows = tuple(
            replace(row, measured_seconds=sites[row.site].seconds, measured_bytes=sites[row.site].bytes_held)
            for row in found.rows
        )
        found = replace(found, rows=rows, measured=str(measured))
    return found
