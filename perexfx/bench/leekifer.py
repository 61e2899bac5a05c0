"""Lee & Kifer 2021 (PoPETs 2021(1):128-144), repeated: their three methods, no privacy, and our planner.

Promises: their models and batch sizes on random inputs; times are of whole steps, memory is what a step allocates at
once on top of model and batch. What a model's smallest batch predicts to take too long is printed as predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from perexfx.bench.memory import peak_allocation
from perexfx.bench.methods import NOT_PRIVATE, OURS, Run, Taken, Trials, in_trials, training
from perexfx.bench.models import mlp
from perexfx.bench.paper_models import OfRows, OneLayerTransformer, conv_net, resnet, vgg
from perexfx.bench.plots import panels
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.bench.steps import set_up
from perexfx.bench.workloads import Workload, numbers

THEIRS = {"one_by_one": "nxBP", "losses": "MultiLoss", "reweight_gp": "ReweightGP"}
"""Engine -> what the paper calls it."""
METHODS = (NOT_PRIVATE, *THEIRS, OURS)
HEADLINE = 128
"""The batch size of their figures."""
PUBLISHED = "Published, on a GPU at a batch of 128: ReweightGP is 54x to 94x as fast as nxBP."
GROWTH = {"losses": 2}
"""Method -> power of the batch size that its time grows with, where it is not 1: B backwards through B examples."""
TOO_LONG = 60.0
"""Seconds of a step that is predicted and not run, but in full runs."""
LIMIT = 20.0
"""Seconds for which a method is timed at one point of a medium run: slow steps are timed one by one, once at least."""


@dataclass(frozen=True)
class Model:
    """One of their models.

    Attributes:
        name: For tables.
        at: Batch size -> workload.
    """

    name: str
    at: partial[Workload]


def _tokens(make: type[OneLayerTransformer], n: int) -> Workload:
    return Workload("", make, partial(torch.randint, 0, 10_000, (n, 128)), partial(torch.randint, 0, 10, (n,)))


def _images(make: partial[Any], shape: tuple[int, ...], n: int) -> Workload:
    return numbers("", make, n, *shape)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("MLP", partial(_images, partial(mlp, (784, 128, 256, 10)), (784,))),
        Model("CNN", partial(_images, partial(conv_net), (1, 28, 28))),
        Model("RNN", partial(_images, partial(OfRows, "rnn"), (28, 28))),
        Model("LSTM", partial(_images, partial(OfRows, "lstm"), (28, 28))),
        Model("Transformer", partial(_tokens, OneLayerTransformer)),
        *(Model(f"ResNet-{d}", partial(_images, partial(resnet, d), (3, 32, 32))) for d in (18, 34, 50, 101)),
        *(
            Model(f"VGG-{d}", partial(_images, partial(vgg, d, pixels=32, normalized=True), (3, 32, 32)))
            for d in (11, 13, 16, 19)
        ),
    )
}


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        batches: Model -> its batch sizes, in growing order.
        how: Trials, and batches in each.
        limit: Seconds of a step that is predicted and not run; None: all are run.
    """

    batches: Mapping[str, Sequence[int]]
    how: Trials
    limit: float | None


_ALL = (16, 32, 64, 128, 256)
_LARGE = ("ResNet-50", "ResNet-101", "VGG-16", "VGG-19")
SIZES = {
    "small": Size(
        {**dict.fromkeys(("MLP", "CNN", "RNN", "LSTM"), (16, 64)), "ResNet-18": (16,), "VGG-11": (16,)},
        Trials(1, 2),
        TOO_LONG,
    ),
    "medium": Size({name: _ALL for name in MODELS if name not in _LARGE}, Trials(3, 3, LIMIT), TOO_LONG),
    "full": Size(dict.fromkeys(MODELS, _ALL), Trials(10, 20), None),
}


@dataclass(frozen=True)
class Measured:
    """One model and batch size, by every method.

    Attributes:
        model: Its name.
        n: Number of examples.
        taken: By method.
        predicted: Methods whose time is predicted from the model's smallest batch.
        allocated: Method -> the most bytes that a step allocates at once, on top of model and batch.
    """

    model: str
    n: int
    taken: Mapping[str, Taken]
    predicted: frozenset[str] = frozenset()
    allocated: Mapping[str, int] | None = None

    def mean(self, method: str) -> float | None:
        """Seconds per step."""
        return self.taken[method].mean

    def speedup(self, method: str) -> float | None:
        """Time of nxBP / a method's."""
        naive, own = self.mean("one_by_one"), self.mean(method)
        return None if naive is None or own is None else naive / own

    @property
    def beside_theirs(self) -> float | None:
        """Our time / the least of their three methods'."""
        theirs = [mean for method in THEIRS if (mean := self.mean(method)) is not None]
        ours = self.mean(OURS)
        return None if ours is None or not theirs else ours / min(theirs)


def run(
    size: str,
    device: torch.device,
    out: Path | None,
    batches: Mapping[str, Sequence[int]] | None = None,
    how: Trials | None = None,
) -> list[Measured]:
    """Measures every row, shows a table, and writes it with a plot of speed-ups.

    Args:
        size: "small", "medium" or "full".
        device: What the steps run on.
        out: Folder for the files; None: show only.
        batches: Other models and batch sizes than those of that size.
        how: Other trials than those of that size.
    """
    asked = SIZES[size]
    asked = replace(asked, batches=batches or asked.batches, how=how or asked.how)
    found = []
    with progress_bar() as progress:
        task = progress.add_task("", total=sum(map(len, asked.batches.values())))
        for name, sizes in asked.batches.items():
            progress.update(task, description=name)
            for measured in of_model(MODELS[name], sizes, asked, device):
                found.append(measured)
                progress.update(task, advance=1, description=f"{name}, batch of {measured.n}")
    publish(_sheet(found, size, asked.how), partial(_draw, found), device, out)
    return found


def of_model(model: Model, sizes: Sequence[int], how: Size, device: torch.device) -> Iterator[Measured]:
    """One model at growing batch sizes."""
    first: Measured | None = None
    for n in sizes:
        workload = replace(model.at(n), name=f"{model.name}, B {n}")
        long = {} if first is None or how.limit is None else _too_long(first, n, how.limit)
        runs: dict[str, Run] = {
            method: training(set_up(workload, device), method) for method in METHODS if method not in long
        }
        taken = {**in_trials(runs, how.how, device), **{name: Taken((seconds,)) for name, seconds in long.items()}}
        allocated = {name: peak_allocation(run, device) for name, run in runs.items() if not taken[name].problem}
        found = Measured(model.name, n, {name: taken[name] for name in METHODS}, frozenset(long), allocated)
        first = first or found
        yield found


def _too_long(first: Measured, n: int, limit: float) -> dict[str, float]:
    """Method -> seconds, as those of the smallest batch grow, where these are more than a limit."""
    seconds = {
        method: mean * (n / first.n) ** GROWTH.get(method, 1)
        for method in METHODS
        if (mean := first.mean(method)) is not None
    }
    return {method: predicted for method, predicted in seconds.items() if predicted > limit}


def headline(found: Sequence[Measured]) -> list[str]:
    """The factor at the largest batch, what bounds it, and our share of that bound."""
    sentences = []
    for name in dict.fromkeys(m.model for m in found):
        group = [m for m in found if m.model == name]
        at = next((m for m in group if m.n == HEADLINE), group[-1])
        bound, ours, theirs = at.speedup(NOT_PRIVATE), at.speedup(OURS), at.speedup("reweight_gp")
        if bound is None or ours is None:
            continue
        reweight = "" if theirs is None else f", ReweightGP {theirs:.1f}x"
        sentences.append(
            f"{name} at a batch of {at.n}: a step that is not private is {bound:.1f}x as fast as nxBP, which bounds "
            f"all methods; ours is {ours:.1f}x{reweight}: {ours / bound:.0%} of the bound."
        )
    return sentences


def fastest(found: Sequence[Measured]) -> str:
    """On how many rows ours is the fastest of all."""
    ratios = {f"{m.model}, B {m.n}": ratio for m in found if (ratio := m.beside_theirs) is not None}
    slower = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio > 1]
    if not slower:
        return f"Ours is faster than their three methods on all {len(ratios)} rows."
    return f"Ours is slower than the fastest of their three methods on {', '.join(slower)}."


def _sheet(found: Sequence[Measured], size: str, how: Trials) -> Sheet:
    named = [THEIRS.get(method, method) for method in METHODS]
    notes = [fastest(found), *headline(found), PUBLISHED, "MB: the most that a step allocates at once, on top of model"]
    notes[-1] += " and batch. Times in brackets are predicted from the model's smallest batch, and not run."
    problems = [f"{m.model}, B {m.n}, {k}: {t.problem}" for m in found for k, t in m.taken.items() if t.problem]
    return Sheet(
        "leekifer",
        f"Lee & Kifer 2021, repeated ({size}): a step, mean of {how.trials} x {how.batches}",
        (
            "model, batch",
            *(f"{name}\nms" for name in named),
            *(f"{name}\nMB" for name in named),
            *(f"{THEIRS.get(method, method)}\nx nxBP" for method in ("reweight_gp", OURS)),
        ),
        [_row(m) for m in found],
        [*notes, *problems],
        {"size": size, "trials": how.trials, "batches": how.batches, "rows": [_raw(m) for m in found]},
    )


def _row(m: Measured) -> list[str]:
    speedups = [m.speedup(method) for method in ("reweight_gp", OURS)]
    return [
        f"{m.model}, B {m.n}",
        *(_cell(m, method) for method in METHODS),
        *(f"{(m.allocated or {})[k] / 1e6:.1f}" if k in (m.allocated or {}) else "" for k in METHODS),
        *("" if speedup is None else f"{speedup:.1f}" for speedup in speedups),
    ]


def _cell(m: Measured, method: str) -> str:
    mean = m.mean(method)
    if mean is None:
        return m.taken[method].problem.split(":", maxsplit=1)[0]
    return f"({mean * 1e3:.0f})" if method in m.predicted else f"{mean * 1e3:.2f}"


def _raw(m: Measured) -> dict[str, Any]:
    return {**asdict(m), "predicted": sorted(m.predicted), "speedups": {k: m.speedup(k) for k in METHODS}}


def _draw(found: Sequence[Measured], figure: Figure) -> None:
    """Speed-ups over nxBP, by batch size; a panel for each model."""

    def curve(model: str, method: str) -> list[tuple[float, float]]:
        return [(m.n, speedup) for m in found if m.model == model and (speedup := m.speedup(method)) is not None]

    names = list(dict.fromkeys(m.model for m in found))
    series = {name: {THEIRS.get(method, method): curve(name, method) for method in METHODS} for name in names}
    panels(figure, series, dict.fromkeys(names, ("examples", "x nxBP")))


__all__ = ["MODELS", "SIZES", "Measured", "Model", "fastest", "headline", "of_model", "run"]
