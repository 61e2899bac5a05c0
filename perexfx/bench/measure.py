"""How times and memory are measured: two steps in turn in one process, and peak memory in a process of its own."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import perexfx
from perexfx.bench.workloads import WORKLOADS, Workload

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Two steps, timed in turn.

    Attributes:
        ordinary: Median seconds of the ordinary step.
        clipped: Median seconds of the clipped step.
        ratio: Median over rounds of clipped / ordinary within the round.
    """

    ordinary: float
    clipped: float
    ratio: float


def in_turn(ordinary: Callable[[], object], clipped: Callable[[], object], rounds: int) -> Iterator[Timing]:
    """Times two steps in turn; yields what is known after each round.

    Machines drift: only the ratio within a round compares like with like.
    """
    for _ in range(WARM_UP):
        ordinary()
        clipped()
    pairs: list[tuple[float, float]] = []
    for _ in range(rounds):
        pairs.append((_seconds(ordinary), _seconds(clipped)))
        yield Timing(
            statistics.median(a for a, _ in pairs),
            statistics.median(b for _, b in pairs),
            statistics.median(b / a for a, b in pairs),
        )


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def training_step(workload: Workload, module: nn.Module, seed: int = 0) -> Callable[[], None]:
    """Forward, loss and backward of one batch, always the same; gradients are forgotten first."""
    torch.manual_seed(seed)
    inputs, targets = workload.inputs(), workload.targets()
    parameters = list(module.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        workload.loss(module(inputs), targets).backward()

    return step


def steps_of(workload: Workload) -> tuple[Callable[[], None], Callable[[], None]]:
    """The ordinary and the clipped step of one model."""
    torch.manual_seed(0)
    model = workload.model()
    return training_step(workload, model), training_step(workload, perexfx.transform(model))


def peak_bytes(name: str, kind: str) -> int:
    """Peak resident memory of a fresh process that takes a few steps of one kind ("ordinary" or "clipped")."""
    command = [sys.executable, "-m", "perexfx.bench.measure", name, kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _main(name: str, kind: str) -> None:
    step = steps_of(WORKLOADS[name])[("ordinary", "clipped").index(kind)]
    for _ in range(WARM_UP):
        step()
    print(_peak_of_this_process())


def _peak_of_this_process() -> int:
    """Bytes. The system's own count of a process starts with what its parent had; `VmHWM` starts anew."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
