"""Rochette, Manoel, Tramel 2019 (arXiv:1912.06015), repeated: their three methods, no privacy, and our planner.

Promises: their networks, batch sizes and way to time; every size of a run has the same points or every second of them.
Times are of whole private steps, forward to optimizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from perexfx.bench.methods import NOT_PRIVATE, OURS, Taken, Trials, in_trials, training
from perexfx.bench.models import AlexNet
from perexfx.bench.paper_models import toy, toy_channels, vgg
from perexfx.bench.plots import panels
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.bench.steps import set_up
from perexfx.bench.workloads import Workload, numbers

THEIRS = {"one_by_one": "naive", "copies": "multi", "chain_rule": "crb"}
"""Engine -> what the paper calls it."""
METHODS = (NOT_PRIVATE, *THEIRS, OURS)
RATES = {2: (1.0, 2.0, 4.0, 8.0, 16.0), 3: (1.0, 2.0, 3.0, 4.0, 5.0), 4: (1.0, 1.75, 2.5, 3.25, 4.0)}
"""Layers -> the rates at which channels grow."""
KERNELS = (3, 5)
BATCHES = (3, 5, 7, 9, 12, 15)
PUBLISHED = {
    "AlexNet": {NOT_PRIVATE: 0.747, "one_by_one": 30.17, "chain_rule": 2.030, "copies": 3.076},
    "VGG-16": {NOT_PRIVATE: 1.947, "one_by_one": 37.20, "chain_rule": 5.591, "copies": 4.630},
}
"""Seconds for twenty batches on a Tesla P100: their table 1."""


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        pixels: Height and width of the images.
        how: Trials, and batches in each.
        every: Every which point of a figure is taken.
    """

    pixels: int
    how: Trials
    every: int


SIZES = {
    "small": Size(32, Trials(1, 2), 2),
    "medium": Size(64, Trials(3, 3), 1),
    "full": Size(256, Trials(10, 20), 1),
}


@dataclass(frozen=True)
class Point:
    """One network and batch.

    Attributes:
        figure: It is a point of.
        value: On that figure's axis.
        workload: What to measure.
    """

    figure: str
    value: float
    workload: Workload


@dataclass(frozen=True)
class Measured:
    """One point, by every method.

    Attributes:
        figure: It is a point of.
        value: On that figure's axis.
        name: Of the network and batch.
        taken: By method.
    """

    figure: str
    value: float
    name: str
    taken: Mapping[str, Taken]

    def mean(self, method: str) -> float | None:
        """Seconds per step."""
        return self.taken[method].mean

    @property
    def beside_theirs(self) -> float | None:
        """Our time / the least of their three methods'."""
        theirs = [mean for method in THEIRS if (mean := self.mean(method)) is not None]
        ours = self.mean(OURS)
        return None if ours is None or not theirs else ours / min(theirs)

    @property
    def chain_rule_to_copies(self) -> float | None:
        """Time of crb / that of multi."""
        crb, multi = self.mean("chain_rule"), self.mean("copies")
        return None if crb is None or multi is None else crb / multi


def points(size: Size) -> Iterator[Point]:
    """All of a run, figure by figure."""
    pixels = size.pixels
    for layers, rates in RATES.items():
        for kernel in KERNELS:
            for rate in rates[:: size.every]:
                model = partial(toy, toy_channels(layers, rate), kernel, pixels)
                name = f"{layers} layers, kernel {kernel}, rate {rate:g}"
                figure = f"{layers} layers, kernel {kernel}"
                yield Point(figure, rate, numbers(name, model, 8, 3, pixels, pixels))
    for n in BATCHES[:: size.every]:
        model = partial(toy, [256] * 3, 5, pixels)
        yield Point("batch size", n, numbers(f"3 layers of 256, kernel 5, B {n}", model, n, 3, pixels, pixels))
    large = max(64, pixels)  # AlexNet has nothing left of smaller images
    yield Point("AlexNet", 16, numbers(f"AlexNet, {large} px, B 16", AlexNet, 16, 3, large, large))
    yield Point(
        "VGG-16", 8, numbers(f"VGG-16, {pixels} px, B 8", partial(vgg, 16, pixels=pixels), 8, 3, pixels, pixels)
    )


def run(
    size: str, device: torch.device, out: Path | None, chosen: Sequence[Point] | None = None, how: Trials | None = None
) -> list[Measured]:
    """Measures every point, shows a table, says which of their claims hold, and writes it with their figures.

    Args:
        size: "small", "medium" or "full".
        device: What the steps run on.
        out: Folder for the files; None: show only.
        chosen: Other points than all of that size.
        how: Other trials than those of that size.
    """
    asked = SIZES[size]
    chosen, how = list(points(asked)) if chosen is None else chosen, how or asked.how
    found = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(chosen))
        for point in chosen:
            progress.update(task, description=point.workload.name)
            found.append(measured(point, how, device))
            progress.advance(task)
    publish(_sheet(found, size, how), partial(_draw, found), device, out)
    return found


def measured(point: Point, how: Trials, device: torch.device) -> Measured:
    """One point: each method trains a model of its own from the same weights."""
    runs = {method: training(set_up(point.workload, device), method) for method in METHODS}
    return Measured(point.figure, point.value, point.workload.name, in_trials(runs, how, device))


def claims(found: Sequence[Measured]) -> list[str]:
    """What they say about the shapes of their curves, and whether it holds here."""
    sentences = []
    of = {name: [m for m in found if m.figure == name] for name in dict.fromkeys(m.figure for m in found)}
    for name, group in of.items():
        ratios = [m.chain_rule_to_copies for m in group]
        if len(group) < 2 or None in ratios:
            continue
        first, last = ratios[0], ratios[-1]
        assert first is not None
        assert last is not None
        grows = "batches grow" if name == "batch size" else "the channel rate grows"
        verdict = "holds" if last < first else "does not hold"
        ends = "below" if last < 1 else "above"
        sentences.append(
            f"{name}: that crb gains on multi as {grows} {verdict} here: crb / multi goes from {first:.2f} to "
            f"{last:.2f}, and ends {ends} 1."
        )
    sentences += _of_kernels(of)
    for name, favours in (("AlexNet", "crb"), ("VGG-16", "multi")):
        ratio = of[name][0].chain_rule_to_copies if name in of else None
        if ratio is not None:
            holds = "holds" if (ratio < 1) == (favours == "crb") else "does not hold"
            sentences.append(f"{name}: that it favours {favours} {holds} here: crb / multi is {ratio:.2f}.")
    return sentences


def _of_kernels(of: Mapping[str, Sequence[Measured]]) -> list[str]:
    means = {}
    for kernel in KERNELS:
        ratios = [
            ratio
            for layers in RATES
            for m in of.get(f"{layers} layers, kernel {kernel}", ())
            if (ratio := m.chain_rule_to_copies) is not None
        ]
        if ratios:
            means[kernel] = statistics.geometric_mean(ratios)
    if len(means) < len(KERNELS):
        return []
    small, large = means[KERNELS[0]], means[KERNELS[-1]]
    holds = "holds" if large < small else "does not hold"
    return [
        f"That larger kernels favour crb {holds} here: crb / multi is {small:.2f} with kernels of {KERNELS[0]}, "
        f"{large:.2f} with kernels of {KERNELS[-1]} (geometric means)."
    ]


def envelope(found: Sequence[Measured]) -> str:
    """How ours lies to the lower envelope of theirs."""
    ratios = {m.name: ratio for m in found if (ratio := m.beside_theirs) is not None}
    if not ratios:
        return "No point has both ours and one of theirs."
    above = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > 1]
    mean = statistics.geometric_mean(ratios.values())
    where = f"above their envelope at {', '.join(above)}" if above else "on or under it at every point"
    ends = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
    return (
        f"Ours takes {mean:.2f} of the fastest of their three methods (geometric mean of {len(ratios)} points, {ends}) "
        f"and is {where}."
    )


def _sheet(found: Sequence[Measured], size: str, how: Trials) -> Sheet:
    headings = [THEIRS.get(method, method) + "\nms" for method in METHODS]
    refused = [f"{m.name}, {THEIRS.get(k, k)}: {t.problem}" for m in found for k, t in m.taken.items() if t.problem]
    published = [
        f"Published for {name}, seconds for 20 batches of 256 px on a Tesla P100: "
        + ", ".join(f"{THEIRS.get(method, method)} {seconds:g}" for method, seconds in row.items())
        + "."
        for name, row in PUBLISHED.items()
    ]
    return Sheet(
        "rochette",
        f"Rochette et al. 2019, repeated ({size}): a private step, mean of {how.trials} x {how.batches} batches",
        ("network", *headings, "perexfx /\nleast of theirs"),
        [_row(m) for m in found],
        [envelope(found), *claims(found), *published, *refused],
        {"size": size, "trials": how.trials, "batches": how.batches, "points": [_raw(m) for m in found]},
    )


def _row(m: Measured) -> list[str]:
    ratio = m.beside_theirs
    return [m.name, *(_cell(m.taken[method]) for method in METHODS), "" if ratio is None else f"{ratio:.2f}"]


def _cell(taken: Taken) -> str:
    if taken.mean is None:
        return taken.problem.split(":", maxsplit=1)[0]
    spread = f" ± {taken.deviation * 1e3:.2f}" if len(taken.seconds) > 1 else ""
    return f"{taken.mean * 1e3:.2f}{spread}"


def _raw(m: Measured) -> dict[str, Any]:
    return {**asdict(m), "beside_theirs": m.beside_theirs}


def _draw(found: Sequence[Measured], figure: Figure) -> None:
    """Their figures: time over channel rate, a row for kernels of each size; over batch size; the two networks."""

    def curve(name: str, method: str) -> list[tuple[float, float]]:
        return [(m.value, mean * 1e3) for m in found if m.figure == name and (mean := m.mean(method)) is not None]

    names = list(dict.fromkeys(m.figure for m in found))
    series = {name: {THEIRS.get(method, method): curve(name, method) for method in METHODS} for name in names}
    of_examples = ("batch size", *PUBLISHED)
    panels(figure, series, {name: ("examples" if name in of_examples else "channel rate", "ms") for name in names})


__all__ = ["SIZES", "Measured", "Point", "claims", "envelope", "measured", "points", "run"]
