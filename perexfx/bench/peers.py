"""Other ways to clipped gradients against the ordinary step: a number only where the gradients are right.

Promises: before a way is timed, its clipped gradients are compared with those of one example at a time; a way that is
wrong, refuses the model, or is not installed has that in place of a number.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perexfx import engines
from perexfx.bench.libraries import PEERS, Maker, Peer, norm_of, one_by_one
from perexfx.bench.measure import Timing, timed
from perexfx.bench.memory import peak_of_process
from perexfx.bench.plots import bars
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.bench.steps import Setup, ordinary, set_up
from perexfx.bench.workloads import Workload

LIMIT = 20.0
"""Seconds after which one way on one workload is not timed further."""
ROUNDING = 1e-5
"""Differences that are this small beside all gradients together are rounding: some gradients are zero in exact
arithmetic."""


@dataclass(frozen=True)
class Sample:
    """Examples on which a way must find what one example at a time finds.

    Attributes:
        dtype: Of model and inputs.
        most: How many examples at most.
        tolerance: Largest relative difference of a parameter's gradient.
    """

    dtype: torch.dtype
    most: int
    tolerance: float

    def of(self, workload: Workload, device: torch.device) -> Setup:
        """The first examples of a workload."""
        setup = set_up(workload, device)
        inputs, targets = setup.inputs[: self.most], setup.targets[: self.most]
        inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
        return replace(setup, model=setup.model.to(self.dtype), inputs=inputs, targets=targets)


SAMPLES = (
    Sample(torch.float64, 8, 1e-4),  # the method, but for the 1e-6 that Opacus adds to norms
    Sample(torch.float32, 1 << 20, 5e-2),  # as measured: there rounding may switch a ReLU of a whole example
)


@dataclass(frozen=True)
class Expected:
    """What every way should find on one workload.

    Attributes:
        clip_norm: The median of the gradient norms in the first sample: half of its examples are clipped.
        gradients: For each sample those of the trained parameters, in order.
    """

    clip_norm: float
    gradients: Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Outcome:
    """One way on one workload.

    Attributes:
        peer: Its name.
        timing: Of the steps "ordinary" and "peer"; None where there is a problem.
        peak_bytes: Peak memory of a process of its own; None where there is a problem.
        problem: "wrong: ...", "refuses: ..." or "not installed: ..."; "" where there is none.
    """

    peer: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        """Its time / the ordinary step's."""
        return None if self.timing is None else self.timing.ratio("peer")


@dataclass(frozen=True)
class Result:
    """One workload.

    Attributes:
        name: Of the workload.
        clip_norm: What gradients were clipped to.
        ordinary_seconds: Median of the ordinary step, timed alone; ratios are with it in turn.
        ordinary_bytes: Peak memory of the ordinary step's process.
        outcomes: One per way.
    """

    name: str
    clip_norm: float
    ordinary_seconds: float
    ordinary_bytes: int
    outcomes: Sequence[Outcome]


def run(
    workloads: Sequence[Workload],
    rounds: int,
    device: torch.device,
    out: Path | None,
    peers: Sequence[Peer] = PEERS,
) -> list[Result]:
    """Measures every way on every workload, shows a table, and writes it with the machine's description.

    Args:
        workloads: What to measure.
        rounds: How many times each step is timed; less where that takes longer than `LIMIT`.
        device: What the steps run on.
        out: Folder for the files; None: show only.
        peers: The ways.
    """
    results = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(workloads) * len(peers))
        for workload in workloads:
            expected = expected_of(workload, device)
            outcomes = []
            for peer in peers:
                progress.update(task, description=f"{workload.name}: {peer.name}")
                outcomes.append(_in_its_own_process(peer, workload, expected, rounds, device))
                progress.advance(task)
            results.append(_result(workload, expected, outcomes, rounds, device))
    publish(_sheet(results, rounds), partial(_draw, results), device, out)
    return results


def expected_of(workload: Workload, device: torch.device) -> Expected:
    """What one example at a time finds, by plain autograd."""
    first = SAMPLES[0].of(workload, device)
    found = engines.one_by_one(first.model, first.loss, first.inputs, first.targets, clip_norm=1.0)
    clip_norm = statistics.median(found.norms.tolist())
    return Expected(clip_norm, [_gradients(one_by_one, sample.of(workload, device), clip_norm) for sample in SAMPLES])


def _in_its_own_process(
    peer: Peer, workload: Workload, expected: Expected, rounds: int, device: torch.device
) -> Outcome:
    """As `outcome`: some ways keep gradients alive, and some take all the memory there is."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(outcome, peer, workload, expected, rounds, device).result()
        except BrokenProcessPool:
            return Outcome(
                peer.name, problem="refuses: its process was killed, most likely for the memory that it took"
            )


def outcome(peer: Peer, workload: Workload, expected: Expected, rounds: int, device: torch.device) -> Outcome:
    """One way on one workload: compared first, then measured.

    Args:
        peer: The way.
        workload: What to measure.
        expected: What it should find.
        rounds: How many times each step is timed, at most.
        device: What the steps run on.
    """
    if not peer.is_installed:
        return Outcome(peer.name, problem=f"not installed: pip install {peer.distribution}")
    try:
        with _quiet():
            if difference := _difference(peer, workload, expected, device):
                return Outcome(peer.name, problem=f"wrong: {difference}")
            step = peer.make(set_up(workload, device), expected.clip_norm)
            steps = {"ordinary": ordinary(set_up(workload, device)), "peer": step}
            timing = timed(steps, rounds, device, LIMIT)
            make = partial(peer.make, clip_norm=expected.clip_norm)
            return Outcome(peer.name, timing, peak_of_process(workload, make, device))
    except Exception as error:  # libraries refuse a model in any way
        return Outcome(peer.name, problem=f"refuses: {_first_words(error)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: libraries warn of their own calls, and where they refuse, their error says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _gradients(make: Maker, setup: Setup, clip_norm: float) -> list[Tensor]:
    """What a way leaves in `.grad`."""
    make(setup, clip_norm)()
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in setup.parameters]


def _difference(peer: Peer, workload: Workload, expected: Expected, device: torch.device) -> str:
    """By how much its gradients differ at most, beyond rounding; "" where they do not."""
    for sample, right in zip(SAMPLES, expected.gradients, strict=True):
        found = _gradients(peer.make, sample.of(workload, device), expected.clip_norm)
        rounding = ROUNDING * float(norm_of(right))
        errors = []
        for a, b in zip(right, found, strict=True):
            error, size = float((a - b).norm()), float(a.norm())
            if not error <= sample.tolerance * size + rounding:
                errors.append(error / size if size else math.inf)
        if errors:
            return (
                f"gradients differ in {len(errors)} of {len(right)} parameters, by {max(errors):.0%} of theirs at most"
            )
    return ""


def _first_words(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 140 else f"{words[:140]}..."


def _result(
    workload: Workload, expected: Expected, outcomes: Sequence[Outcome], rounds: int, device: torch.device
) -> Result:
    alone = timed({"ordinary": ordinary(set_up(workload, device))}, rounds, device, LIMIT)
    peak = peak_of_process(workload, ordinary, device)
    return Result(workload.name, expected.clip_norm, alone.median("ordinary"), peak, outcomes)


def _sheet(results: Sequence[Result], rounds: int) -> Sheet:
    problems = [
        f"{result.name}, {outcome.peer}: {outcome.problem}"
        for result in results
        for outcome in result.outcomes
        if outcome.problem
    ]
    return Sheet(
        "peers",
        "ways to clipped gradients, time / peak memory of a process, as multiples of the ordinary step's",
        ("workload", "ordinary\nms", "ordinary\nMB", *(outcome.peer for outcome in results[0].outcomes)),
        [_row(result) for result in results],
        ["The memory of a process has in it what a library loads.", *problems],
        {"rounds": rounds, "limit_seconds": LIMIT, "results": [_raw(result) for result in results]},
    )


def _row(result: Result) -> list[str]:
    cells = [_cell(outcome, result.ordinary_bytes) for outcome in result.outcomes]
    return [result.name, f"{result.ordinary_seconds * 1e3:.2f}", f"{result.ordinary_bytes / 1e6:.0f}", *cells]


def _cell(outcome: Outcome, ordinary_bytes: int) -> str:
    if outcome.ratio is None or outcome.peak_bytes is None:
        return outcome.problem.split(":", maxsplit=1)[0]
    return f"{outcome.ratio:.2f} / {outcome.peak_bytes / ordinary_bytes:.2f}"


def _raw(result: Result) -> dict[str, Any]:
    outcomes = [{**asdict(outcome), "ratio": outcome.ratio} for outcome in result.outcomes]
    return {**asdict(result), "outcomes": outcomes}


def _draw(results: Sequence[Result], figure: Figure) -> None:
    figure.set_size_inches(10, 8)
    above, below = figure.subplots(2, 1, sharex=True)
    names = [result.name for result in results]
    ways = [outcome.peer for outcome in results[0].outcomes]

    def of(value: Callable[[Result, Outcome], float | None]) -> dict[str, list[float | None]]:
        return {way: [value(result, result.outcomes[at]) for result in results] for at, way in enumerate(ways)}

    bars(above, names, of(lambda _, outcome: outcome.ratio), is_log=True, missing="x")
    above.set_ylabel("time / ordinary step's")
    above.legend(frameon=False, ncols=len(ways), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    memory = of(lambda result, o: None if o.peak_bytes is None else o.peak_bytes / result.ordinary_bytes)
    bars(below, names, memory, is_log=True, missing="x")
    below.set_ylabel("peak memory / ordinary process's")
