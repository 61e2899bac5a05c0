"""Training steps by every whole-model method, for the tables that repeat the papers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import perexfx
from perexfx import engines
from perexfx.bench.measure import seconds_of
from perexfx.bench.steps import Setup
from perexfx.ir.errors import PerexError

Run = Callable[[], object]
CLIP_NORM = 1.0
SETTLED = 0.2
"""Seconds that a method runs untimed before each of its trials, unless one of its steps takes longer: the memory that
another method gave back is taken again, and clocks and caches are as in a training loop."""
NOT_PRIVATE, OURS = "not private", "perexfx"


def training(setup: Setup, method: str) -> Run:
    """A whole step on a setup's batch, optimizer included.

    Args:
        setup: Model and batch.
        method: "not private", "perexfx", or the name of an engine.
    """
    optimizer = torch.optim.SGD(setup.parameters, lr=1e-3)
    if method in (NOT_PRIVATE, OURS):
        module = setup.model if method == NOT_PRIVATE else perexfx.transform(setup.model, clip_norm=CLIP_NORM)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            setup.loss(module(setup.inputs), setup.targets).backward()
            optimizer.step()

        return step
    found = engines.by_name(method).step(setup.model, setup.loss, optimizer, clip_norm=CLIP_NORM)
    return lambda: found(setup.inputs, setup.targets)


@dataclass(frozen=True)
class Trials:
    """How often steps are taken.

    Attributes:
        trials: How many times a run of steps is timed.
        batches: Steps in a run.
        limit: Seconds of one method: where its first step says that all would take longer, it is timed by single steps,
            as many as fit, and one at least.
    """

    trials: int
    batches: int
    limit: float = math.inf

    def of(self, seconds: float) -> tuple[int, int]:
        """Trials, and batches in each, of steps that take so long."""
        if seconds * self.trials * self.batches <= self.limit:
            return self.trials, self.batches
        return max(1, min(self.trials, int(self.limit / seconds))), 1


@dataclass(frozen=True)
class Taken:
    """What one method took.

    Attributes:
        seconds: Per step, one for each trial; empty where there is a problem.
        problem: Why there is no number: refused, or no memory left; "" where there is one.
    """

    seconds: tuple[float, ...] = ()
    problem: str = ""

    @property
    def mean(self) -> float | None:
        """Seconds per step."""
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    @property
    def deviation(self) -> float:
        """Of the trials, around their mean."""
        if self.mean is None:
            return 0.0
        return (sum((s - self.mean) ** 2 for s in self.seconds) / len(self.seconds)) ** 0.5


def in_trials(runs: Mapping[str, Run], how: Trials, device: torch.device) -> dict[str, Taken]:
    """Times methods in turn, trial after trial, each after untimed steps to warm up; a run that fails is left out.

    Args:
        runs: By method.
        how: How often.
        device: What they run on.
    """
    found: dict[str, list[float]] = {}
    problems: dict[str, str] = {}
    first: dict[str, float] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        if problem := failure_of(run):
            problems[name] = problem
        else:
            found[name], first[name] = [], time.perf_counter() - start
    for trial in range(how.trials):
        for name, seconds in found.items():
            trials, batches = how.of(first[name])
            if trial >= trials:
                continue
            if first[name] < 2 * SETTLED:  # the first step of a method is slower than others
                _settle(runs[name], device)
            seconds.append(seconds_of(lambda run=runs[name], b=batches: _several(run, b), device) / batches)
    return {name: Taken(problem=problems[name]) if name in problems else Taken(tuple(found[name])) for name in runs}


def _settle(run: Run, device: torch.device) -> None:
    left = SETTLED
    while left > 0:
        left -= seconds_of(run, device)


def _several(run: Run, batches: int) -> None:
    for _ in range(batches):
        run()


def failure_of(run: Run) -> str:
    """Why a method cannot run; "" where it can."""
    try:
        run()
    except PerexError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except (MemoryError, torch.OutOfMemoryError) as error:
        return f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return f"out of memory: {str(error).splitlines()[0]}"
    return ""


__all__ = ["CLIP_NORM", "NOT_PRIVATE", "OURS", "Run", "Taken", "Trials", "failure_of", "in_trials", "training"]
