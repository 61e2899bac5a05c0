"""The plan across batch sizes: which strategy each site has at each, and what the whole then costs.

Promises: every size asked for has a column, every site a row; a size that no plan fits says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import Inputs
from perexfx.ir.site import Key
from perexfx.planning import Plan
from perexfx.runtime import Runtime
from perexfx.views.cells import Cells
from perexfx.views.decisions import decided, plans_for
from perexfx.views.pages import Viewed
from perexfx.views.words import aligned, megabytes

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class SiteAt:
    """One site at one batch size.

    Attributes:
        strategy: Its name.
        seconds: Predicted.
        bytes_held: Predicted.
    """

    strategy: str
    seconds: float
    bytes_held: int


@dataclass(frozen=True)
class Column:
    """One batch size.

    Attributes:
        batch_size: The number of examples.
        fits: Whether a plan fits the memory budget; where none does, all else is empty.
        seconds: Predicted, for all norms and clipped sums.
        ordinary_seconds: Predicted, for ordinary gradients of the same parameters.
        bytes_added: By how many bytes the peak of a step is predicted to grow.
        sites: In graph order.
    """

    batch_size: int
    fits: bool
    seconds: float = 0.0
    ordinary_seconds: float = 0.0
    bytes_added: int = 0
    sites: tuple[SiteAt, ...] = ()

    @property
    def seconds_by_strategy(self) -> dict[str, float]:
        """Strategy -> predicted seconds of its sites, in the order in which they appear."""
        found: dict[str, float] = {}
        for site in self.sites:
            found[site.strategy] = found.get(site.strategy, 0.0) + site.seconds
        return found


@dataclass(frozen=True)
class Sweep(Viewed):
    """The plan across batch sizes. `str(sweep)` is a table; a notebook shows the chart that `to_html` writes.

    Attributes:
        machine: The machine profile.
        sites: Their names, in graph order; other operands that have a choice have a line of their own.
        columns: One per batch size, in the order asked for.
    """

    schema = "perexfx.sweep/1"
    template = "sweep"

    machine: str
    sites: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def table(self) -> list[tuple[str, ...]]:
        """Headings, a row per site, and the totals."""
        rows: list[tuple[str, ...]] = [("site", *(str(column.batch_size) for column in self.columns))]
        for at, site in enumerate(self.sites):
            rows.append((site, *(c.sites[at].strategy if c.fits else "none fits" for c in self.columns)))
        return [*rows, *self.totals]

    @property
    def totals(self) -> list[tuple[str, ...]]:
        """Time and memory of each batch size."""

        def line(name: str, cells: Sequence[str]) -> tuple[str, ...]:
            return (name, *(cell if c.fits else "" for cell, c in zip(cells, self.columns, strict=True)))

        return [
            line("ms", [f"{c.seconds * 1e3:.3f}" for c in self.columns]),
            line("ms, ordinary", [f"{c.ordinary_seconds * 1e3:.3f}" for c in self.columns]),
            line("us per example", [f"{c.seconds / max(1, c.batch_size) * 1e6:.1f}" for c in self.columns]),
            line("MB more", [megabytes(c.bytes_added, is_signed=True) for c in self.columns]),
        ]

    @property
    def title(self) -> str:
        """What it shows."""
        return f"perexfx plans by batch size, predicted by the {self.machine}"

    @property
    def strategies(self) -> tuple[str, ...]:
        """Those that occur."""
        return tuple(dict.fromkeys(site.strategy for column in self.columns for site in column.sites))

    @property
    def most_seconds_per_example(self) -> float:
        """The largest predicted time per example of any batch size."""
        return max((c.seconds / max(1, c.batch_size) for c in self.columns), default=0.0)

    def __str__(self) -> str:
        return "\n".join([self.title, "", *aligned(self.table, is_headed=True)])

    def __rich__(self) -> Table:
        from perexfx.views.rich_tables import sweep_table  # noqa: PLC0415 (rich itself is what calls this)

        headings, *rows = self.table[: len(self.sites) + 1]
        table = Cells(self.title, headings, tuple(rows), numbers=headings[1:], strategies=headings[1:])
        return sweep_table(table, self.totals)


def sweep_of(runtime: Runtime, kind: Inputs, batch_sizes: Sequence[int]) -> Sweep:
    """The plans for one kind of input at several batch sizes.

    Raises:
        ArgumentError: A batch size is not positive, or there is none.
    """
    sizes = list(batch_sizes) if isinstance(batch_sizes, Iterable) else []
    if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        raise ArgumentError(f"`batch_sizes` should be positive numbers. Found {batch_sizes!r}.")
    plans = plans_for(runtime, kind, sizes)
    assert runtime.plan is not None
    keys = decided(runtime.plan)
    return Sweep(runtime.plan.machine, tuple(keys.values()), tuple(_column(n, plans[n], list(keys)) for n in sizes))


def _column(n: int, plan: Plan | None, keys: Sequence[Key]) -> Column:
    """What was decided; operands without a choice count with the first of their site."""
    if plan is None:
        return Column(n, fits=False)
    found = {}
    for decision in plan.decisions:
        key = (decision.site, decision.operand)
        own = key if key in keys else next(other for other in keys if other[0] == decision.site)
        found.setdefault(own, []).append(decision)
    sites = [
        SiteAt(
            plan.strategies[key].name,
            sum(decision.seconds for decision in found[key]),
            sum(decision.chosen.bytes_held for decision in found[key]),
        )
        for key in keys
    ]
    return Column(n, True, plan.seconds, plan.ordinary_seconds, plan.bytes_added, tuple(sites))
