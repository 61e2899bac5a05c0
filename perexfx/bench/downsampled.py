"""What reduced batches cost beside full ones, ordinary and private: the r of `perexfx.downsample`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

import perexfx
from perexfx.bench.measure import Timing, timed
from perexfx.bench.models import BasicBlock
from perexfx.bench.paper_models import resnet, vgg
from perexfx.bench.plots import bars
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.bench.steps import set_up, training_step
from perexfx.bench.workloads import Workload, numbers

FULL = "full"
SIDE, GALERKIN = KERNELS = ("side", "galerkin")


def small_resnet(channels: Sequence[int]) -> nn.Module:
    """A residual network of three blocks, the last two at half the size of what is before them."""
    first, second, third = channels
    blocks = BasicBlock(first, first, 1), BasicBlock(first, second, 2), BasicBlock(second, third, 2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10)
    return nn.Sequential(nn.Conv2d(3, first, 3, 1, 1), nn.ReLU(), *blocks, *head)


NETS: tuple[Workload, ...] = (
    numbers("ResNet 16-32-64, 32 px, B 32", partial(small_resnet, (16, 32, 64)), 32, 3, 32, 32),
    numbers("ResNet 64-128-256, 32 px, B 8", partial(small_resnet, (64, 128, 256)), 8, 3, 32, 32),
    numbers("ResNet-18, 32 px, B 8", partial(resnet, 18), 8, 3, 32, 32),
    numbers("ResNet-18, 64 px, B 4", partial(resnet, 18), 4, 3, 64, 64),
    numbers("VGG-11, 32 px, B 16", partial(vgg, 11, pixels=32, normalized=True), 16, 3, 32, 32),
)


@dataclass(frozen=True)
class Measured:
    """One network.

    Attributes:
        name: Of the network and batch.
        timings: Kernel -> of the steps "full" and "reduced", "private full" and "private reduced", in turn.
        predicted: The r that the report predicts for side kernels.
    """

    name: str
    timings: Mapping[str, Timing]
    predicted: float

    def ratio(self, kernel: str) -> float:
        """Ordinary reduced step / full one."""
        return self.timings[kernel].ratio("reduced", FULL)

    def private_ratio(self, kernel: str) -> float:
        """Private reduced step / private full one."""
        return self.timings[kernel].ratio("private reduced", f"private {FULL}")


def run(rounds: int, device: torch.device, out: Path | None, nets: Sequence[Workload] = NETS) -> list[Measured]:
    """Measures every network, shows a table, and writes it with a plot.

    Args:
        rounds: How many times each step is timed.
        device: What the steps run on.
        out: Folder for the files; None: show only.
        nets: What to measure.
    """
    found = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(nets))
        for net in nets:
            progress.update(task, description=net.name)
            found.append(measured(net, rounds, device))
            progress.advance(task)
    publish(_sheet(found, rounds), partial(_draw, found), device, out)
    return found


def measured(net: Workload, rounds: int, device: torch.device) -> Measured:
    """One network: all steps train the same parameters, those of one kernel in turn."""
    setup = set_up(net, device)
    reduced = {kernel: perexfx.downsample(setup.model, setup.inputs, kernel=kernel) for kernel in KERNELS}
    timings = {}
    for kernel, module in reduced.items():
        modules = {FULL: setup.model, "reduced": module}
        private = {f"private {name}": perexfx.transform(m, setup.inputs) for name, m in modules.items()}
        steps = {name: training_step(setup, m) for name, m in (modules | private).items()}
        timings[kernel] = timed(steps, rounds, device)
    report = perexfx.report(reduced[SIDE])
    assert report.ratio is not None
    return Measured(net.name, timings, report.ratio)


def _sheet(found: Sequence[Measured], rounds: int) -> Sheet:
    return Sheet(
        "downsample",
        f"reduced steps beside full ones: median ratios of {rounds} rounds",
        (
            "network",
            "full\nms",
            "private full\nms",
            *(f"{step} /\nfull" for step in KERNELS),
            *(f"private {step} /\nprivate full" for step in KERNELS),
            "r predicted\n(side)",
        ),
        [_row(m) for m in found],
        [
            "Side kernels keep every strategy, since their map has orthogonal rows. Those of galerkin are not: "
            "each example's gradient is formed and pulled back, which a private step pays for."
        ],
        {"rounds": rounds, "nets": [_raw(m) for m in found]},
    )


def _row(m: Measured) -> list[str]:
    return [
        m.name,
        *(f"{m.timings[SIDE].median(step) * 1e3:.1f}" for step in (FULL, f"private {FULL}")),
        *(f"{m.ratio(step):.2f}" for step in KERNELS),
        *(f"{m.private_ratio(step):.2f}" for step in KERNELS),
        f"{m.predicted:.2f}",
    ]


def _raw(m: Measured) -> dict[str, Any]:
    ratios = {step: m.ratio(step) for step in KERNELS}
    return {**asdict(m), "ratios": ratios, "private_ratios": {step: m.private_ratio(step) for step in ratios}}


def _draw(found: Sequence[Measured], figure: Figure) -> None:
    figure.set_size_inches(9, 4)
    series = {
        "side": [m.ratio(SIDE) for m in found],
        "side, private": [m.private_ratio(SIDE) for m in found],
        "galerkin": [m.ratio(GALERKIN) for m in found],
    }
    axes = figure.subplots()
    bars(axes, [m.name.replace(", ", "\n", 1) for m in found], series)
    axes.set_ylabel("reduced step / full step")


__all__ = ["NETS", "Measured", "measured", "run", "small_resnet"]
