"""How time and memory of both steps grow as one size of a model doubles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from perexfx.bench.families import FAMILIES, Family
from perexfx.bench.measure import Timing, timed
from perexfx.bench.memory import peak_allocation
from perexfx.bench.plots import curves
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.bench.steps import clipped, ordinary, set_up
from perexfx.bench.workloads import Workload

LIMIT = 3.0
"""Seconds after which the steps of one size are not timed further."""
LAST = 3
"""Points that an exponent is fitted to: at smaller sizes it is calls that take the time."""
STEPS = ("ordinary", "clipped")


@dataclass(frozen=True)
class Point:
    """Both steps at one size.

    Attributes:
        value: The size.
        timing: Of the steps "ordinary" and "clipped".
        allocated: Name of a step -> the most bytes it has allocated at once, on top of model and batch.
    """

    value: int
    timing: Timing
    allocated: dict[str, int]


@dataclass(frozen=True)
class Sweep:
    """One size of one family, doubled again and again.

    Attributes:
        family: Its name.
        size: Name of the size.
        points: In growing order.
    """

    family: str
    size: str
    points: Sequence[Point]

    @property
    def values(self) -> list[int]:
        """Of the size."""
        return [point.value for point in self.points]

    def seconds(self, step: str) -> list[float]:
        """One per point."""
        return [point.timing.median(step) for point in self.points]

    def allocated(self, step: str) -> list[float]:
        """Bytes, one per point."""
        return [point.allocated[step] for point in self.points]


def run(rounds: int, device: torch.device, out: Path | None, families: Sequence[Family] = FAMILIES) -> list[Sweep]:
    """Measures every sweep, shows a table, and writes it with the machine's description.

    Args:
        rounds: How many times each step is timed; less where that takes longer than `LIMIT`.
        device: What the steps run on.
        out: Folder for the files; None: show only.
        families: The models and their sizes.
    """
    total = sum(len(size.values) for family in families for size in family.sizes.values())
    sweeps = []
    with progress_bar() as progress:
        task = progress.add_task("", total=total)
        for family in families:
            for name, size in family.sizes.items():
                points = []
                for value in size.values:
                    progress.update(task, description=f"{family.name}, {name} {value}")
                    points.append(_measured(family.at(name, value), value, rounds, device))
                    progress.advance(task)
                sweeps.append(Sweep(family.name, name, points))
    publish(_sheet(sweeps, rounds, device), partial(_draw, sweeps), device, out)
    return sweeps


def _measured(workload: Workload, value: int, rounds: int, device: torch.device) -> Point:
    setup = set_up(workload, device)
    steps = {"ordinary": ordinary(setup), "clipped": clipped(setup)}
    timing = timed(steps, rounds, device, LIMIT)
    allocated = {}
    for name, step in steps.items():
        setup.forget_gradients()
        allocated[name] = peak_allocation(step, device)
    return Point(value, timing, allocated)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The `a` of `values ~ sizes^a`, with least squared relative error.

    Args:
        sizes: Two at least, above zero.
        values: One per size, above zero.
    """
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope


def _exponents(sweep: Sweep) -> dict[str, float]:
    """Of times and memory, over the last points."""
    sizes = sweep.values[-LAST:]
    times = {f"{step} time": exponent(sizes, sweep.seconds(step)[-LAST:]) for step in STEPS}
    return times | {f"{step} memory": exponent(sizes, sweep.allocated(step)[-LAST:]) for step in STEPS}


def _sheet(sweeps: Sequence[Sweep], rounds: int, device: torch.device) -> Sheet:
    witness = "CUDA allocator" if device.type == "cuda" else "profiler"
    fitted = [f"{step}\n{what}" for what in ("time", "memory") for step in STEPS]
    return Sheet(
        "scale",
        "how steps grow: a in `time ~ size^a` and `memory ~ size^a`",
        ("model, size", "from - to", *fitted, "clipped / ordinary\ntime at the end", "clipped / ordinary\nmemory"),
        [_row(sweep) for sweep in sweeps],
        [
            f"Least squares over the last {LAST} sizes. Memory is the most that a step has allocated at once, on top "
            f"of model and batch, by torch's {witness}."
        ],
        {"rounds": rounds, "limit_seconds": LIMIT, "sweeps": [_raw(sweep) for sweep in sweeps]},
    )


def _row(sweep: Sweep) -> list[str]:
    last = sweep.points[-1]
    return [
        f"{sweep.family}, {sweep.size}",
        f"{sweep.values[0]} - {sweep.values[-1]}",
        *(f"{found:.2f}" for found in _exponents(sweep).values()),
        f"{last.timing.ratio('clipped'):.2f}",
        f"{last.allocated['clipped'] / last.allocated['ordinary']:.2f}",
    ]


def _raw(sweep: Sweep) -> dict[str, Any]:
    return {**asdict(sweep), "exponents": _exponents(sweep)}


def _draw(sweeps: Sequence[Sweep], figure: Figure) -> None:
    """A pair of rows per family, times and memory; a column per size."""
    families = {sweep.family: [other for other in sweeps if other.family == sweep.family] for sweep in sweeps}
    columns = max(len(group) for group in families.values())
    figure.set_size_inches(10, 1.9 * 2 * len(families))
    every = figure.subplots(2 * len(families), columns, squeeze=False)
    for axes in every.flat:
        axes.set_axis_off()
    quantities: list[tuple[str, float, Callable[[Sweep, str], list[float]]]] = [
        ("ms", 1e3, Sweep.seconds),
        ("MB", 1e-6, Sweep.allocated),
    ]
    for at, (family, group) in enumerate(families.items()):
        for column, sweep in enumerate(group):
            for row, (unit, scale, values) in enumerate(quantities):
                axes = every[2 * at + row, column]
                axes.set_axis_on()
                shown = {step: [value * scale for value in values(sweep, step)] for step in STEPS}
                curves(axes, sweep.values, shown)
                axes.set_title(f"{family}: {unit} over {sweep.size}", fontsize=9)
    figure.legend(*every[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
