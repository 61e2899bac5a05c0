"""Clipped against ordinary step: times interleaved in one process, peak memory of either in its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import perexfx
from perexfx.bench.measure import Timing, in_turn
from perexfx.bench.memory import peak_allocation, peak_of_process
from perexfx.bench.plots import bars
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.bench.steps import Setup, Step, clipped, ordinary, set_up, training_step
from perexfx.bench.workloads import Workload
from perexfx.steps import CompiledStep

SMALL = 10
"""Small steps are timed so many times as often."""


@dataclass(frozen=True)
class Result:
    """One workload.

    Attributes:
        name: Of the workload.
        timing: Of the steps "ordinary", "clipped" and, for small workloads, "compiled".
        way: What `compile_step` took: "eager", "graph" or "compiled"; "" where it was not asked.
        ordinary_bytes: Peak memory of the ordinary step's process.
        clipped_bytes: Peak memory of the clipped step's process.
        allocated: Name of a step -> the most bytes it has allocated at once, on top of model and batch.
        predicted_added: By how much the plan predicts that this grows.
        predicted_beyond: Seconds that the plan predicts for norms and clipped sums, less those of ordinary gradients.
    """

    name: str
    timing: Timing
    way: str
    ordinary_bytes: int
    clipped_bytes: int
    allocated: Mapping[str, int]
    predicted_added: int
    predicted_beyond: float

    @property
    def predicted_ratio(self) -> float:
        """What the clipped step would take by prediction / the ordinary one."""
        return 1 + self.predicted_beyond / self.timing.median("ordinary")

    @property
    def added(self) -> int:
        """By how much the most that a step has allocated grows."""
        return self.allocated["clipped"] - self.allocated["ordinary"]

    @property
    def ratio(self) -> float:
        """The one that the geometric mean counts."""
        return self.timing.ratio("compiled" if self.way else "clipped")

    @property
    def bytes_ratio(self) -> float:
        """Of the clipped step's process to the ordinary one's."""
        return self.clipped_bytes / self.ordinary_bytes


def run(workloads: Sequence[Workload], rounds: int, device: torch.device, out: Path | None) -> list[Result]:
    """Measures workloads, shows a table, and writes it with the machine's description.

    Args:
        workloads: What to measure.
        rounds: How many times each step is timed.
        device: What the steps run on.
        out: Folder for the files; None: show only.
    """
    results = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(workloads) * (rounds + 2))
        for workload in workloads:
            progress.update(task, description=workload.name)
            results.append(_measured(workload, rounds, device, partial(progress.advance, task)))
    publish(_sheet(results, rounds), partial(_draw, results), device, out)
    return results


def _measured(workload: Workload, rounds: int, device: torch.device, advance: Callable[[], None]) -> Result:
    setup = set_up(workload, device)
    transformed = perexfx.transform(setup.model)
    steps = {"ordinary": ordinary(setup), "clipped": training_step(setup, transformed)}
    whole = perexfx.compile_step(transformed, setup.loss) if workload.is_small else None
    if whole is not None:
        steps["compiled"] = _whole_step(setup, whole)
    timing: Timing | None = None
    many = SMALL if workload.is_small else 1
    for at, timing in enumerate(in_turn(steps, many * rounds, device), start=1):  # noqa: B007
        if at % many == 0:
            advance()
    assert timing is not None
    way = next(iter(whole.ways.values())) if whole is not None else ""
    allocated = {}
    for name in ("ordinary", "clipped"):
        setup.forget_gradients()
        allocated[name] = peak_allocation(steps[name], device)
    plan = transformed.perexfx.plan
    assert plan is not None
    peaks = []
    for make in (ordinary, clipped):
        peaks.append(peak_of_process(workload, make, device))
        advance()
    before, after = peaks
    return Result(
        workload.name, timing, way, before, after, allocated, plan.bytes_added, plan.seconds - plan.ordinary_seconds
    )


def _whole_step(setup: Setup, whole: CompiledStep) -> Step:
    """The first call takes long: it settles on a way. Calls to warm up are thus enough."""

    def step() -> None:
        setup.forget_gradients()
        whole(setup.inputs, setup.targets)

    return step


def _sheet(results: Sequence[Result], rounds: int) -> Sheet:
    times = ("ordinary\nms", "clipped\nms", "ratio", "predicted\nratio", "compiled\nms", "ratio")
    small = ", ".join(result.name for result in results if result.way)
    counted = f", of the compiled step for {small} and of the eager one for the others" if small else ""
    mean = statistics.geometric_mean(result.ratio for result in results)
    return Sheet(
        "suite",
        "clipped against ordinary step",
        ("workload", *times, "ordinary\nMB", "clipped\nMB", "ratio", "allocated\nMB more", "predicted\nMB more"),
        [_row(result) for result in results],
        [
            f"Geometric mean of the ratios {mean:.3f}{counted}.",
            "The predicted ratio is the plan's: norms and clipped sums in place of ordinary parameter gradients.",
            "MB are peaks of processes of their own; allocated is what torch's allocator has handed out at once, on "
            "top of model and batch.",
        ],
        {"rounds": rounds, "geometric_mean": mean, "results": [_raw(result) for result in results]},
    )


def _row(result: Result) -> list[str]:
    timing = result.timing
    compiled = [f"{timing.median('compiled') * 1e3:.2f}", f"{timing.ratio('compiled'):.3f}"] if result.way else ["", ""]
    return [
        result.name,
        f"{timing.median('ordinary') * 1e3:.2f}",
        f"{timing.median('clipped') * 1e3:.2f}",
        f"{timing.ratio('clipped'):.3f}",
        f"{result.predicted_ratio:.3f}",
        *compiled,
        f"{result.ordinary_bytes / 1e6:.0f}",
        f"{result.clipped_bytes / 1e6:.0f}",
        f"{result.bytes_ratio:.3f}",
        f"{result.added / 1e6:+.1f}",
        f"{result.predicted_added / 1e6:+.1f}",
    ]


def _raw(result: Result) -> dict[str, Any]:
    others = [name for name in result.timing.seconds if name != "ordinary"]
    return {**asdict(result), "ratios": {name: result.timing.ratio(name) for name in others}}


def _draw(results: Sequence[Result], figure: Figure) -> None:
    figure.set_size_inches(10, 8)
    above, below = figure.subplots(2, 1, sharex=True)
    names = [result.name for result in results]
    whole = [result.timing.ratio("compiled") if result.way else None for result in results]
    times = {"clipped step": [result.timing.ratio("clipped") for result in results]}
    bars(above, names, {**times, "clipped step by compile_step": whole} if any(whole) else times)
    above.set_ylabel("time / ordinary step's")
    above.legend(frameon=False, loc="upper center", ncols=2)
    bars(below, names, {"clipped step": [result.bytes_ratio for result in results]})
    below.set_ylabel("peak memory / ordinary process's")
