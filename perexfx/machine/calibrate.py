"""Calibration: a machine profile from measurements on this machine.

Promises: in under a minute it times every strategy and the layers' own work over a grid of sizes, and fits to each kind
of work a rate per flop, per byte and per call, none below zero, with the least relative error. A profile says how well
it fits, and is kept for this machine, torch version, number of threads and kernels alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from scipy.optimize import nnls

from perexfx import kernels
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost
from perexfx.ir.cost_model import BUILT_IN, Machine, Rate
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature, Signature
from perexfx.ir.strategy import Strategy
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.machine.on_disk import processor
from perexfx.machine.timings import HOPELESS, measure, medians
from perexfx.runtime import in_format
from perexfx.sites import convolution_work, image_work

LONGEST = 0.08
"""Seconds that a candidate may take by the built-in profile, or it is not measured."""


@dataclass(frozen=True)
class Observation:
    """One timing.

    Attributes:
        what: The size, in words.
        name: The strategy, or the layer's work.
        cost: What it is made of.
        seconds: Measured.
    """

    what: str
    name: str
    cost: Cost
    seconds: float


def signatures() -> list[Signature]:
    """The grid: layers of common models, at small and large batches."""
    convolutions = [  # examples, in, out, size, kernel, stride, groups
        *((8, 3, 64, 32, 3, 1, 1), (32, 3, 64, 32, 3, 1, 1), (8, 3, 64, 128, 7, 2, 1), (64, 1, 16, 28, 8, 2, 1)),
        *((8, 64, 64, 32, 3, 1, 1), (32, 64, 64, 16, 3, 1, 1), (32, 64, 64, 32, 3, 1, 1), (4, 64, 64, 56, 3, 1, 1)),
        *((32, 64, 128, 32, 3, 2, 1), (32, 64, 128, 32, 1, 2, 1), (8, 128, 128, 28, 3, 1, 1)),
        *((32, 128, 128, 16, 3, 1, 1), (32, 128, 128, 8, 3, 1, 1), (32, 128, 256, 16, 3, 2, 1)),
        *((8, 256, 256, 14, 3, 1, 1), (32, 256, 256, 8, 3, 1, 1), (32, 256, 512, 8, 3, 2, 1)),
        *((8, 512, 512, 7, 3, 1, 1), (32, 512, 512, 4, 3, 1, 1), (8, 64, 192, 31, 5, 1, 1), (8, 192, 384, 15, 3, 1, 1)),
        *((16, 256, 64, 28, 1, 1, 1), (16, 64, 256, 28, 1, 1, 1), (16, 512, 128, 14, 1, 1, 1)),
        *((16, 116, 116, 6, 1, 1, 1), (16, 24, 144, 24, 1, 1, 1), (64, 16, 32, 14, 4, 2, 1), (16, 16, 16, 32, 3, 1, 1)),
        *((8, 25, 25, 32, 5, 1, 1), (8, 50, 50, 32, 3, 1, 1)),
        *((16, 32, 32, 56, 3, 1, 32), (16, 144, 144, 24, 3, 2, 144), (16, 576, 576, 6, 3, 1, 576)),
        *((8, 96, 96, 24, 7, 1, 96), (16, 128, 128, 14, 3, 1, 32)),
    ]
    products = [  # examples, positions, in, out
        *((16, 197, 192, 768), (16, 197, 192, 192), (8, 128, 256, 1024), (32, 128, 256, 256), (4, 512, 256, 256)),
        *((32, 64, 128, 512), (64, 16, 64, 64), (16, 49, 512, 512), (2, 1024, 64, 64), (8, 64, 768, 768)),
        *((8, 32, 256, 4000), (256, 4, 32, 32)),
    ]
    return [
        *(_convolution(*sizes, last) for sizes in convolutions for last in (False, True)),
        *(_product(*sizes) for sizes in products),
        *(_product(n, 1, i, o) for n, i, o in ((256, 784, 128), (64, 512, 10), (16, 2048, 1024))),
        *(RowsSignature(n, t, v, d) for n, t, v, d in ((32, 128, 8000, 256), (256, 32, 1000, 32), (8, 512, 8000, 64))),
        *(GradientSignature(n, shape) for n, shape in ((32, (512,)), (256, (64, 64)), (16, (1024, 256)))),
    ]


def _product(n: int, t: int, i: int, o: int) -> ProductSignature:
    return ProductSignature(n, 1, t, i, o, (o, i), has_kernels=kernels.are_built())


def _convolution(
    n: int, channels: int, out: int, size: int, kernel: int, stride: int, groups: int, last: bool
) -> ConvolutionSignature:
    padding = kernel // 2
    after = (size + 2 * padding - kernel) // stride + 1
    slide = ConvolutionGeometry((stride, stride), (padding, padding), (1, 1), groups)
    return ConvolutionSignature(
        n,
        1,
        (size, size),
        (after, after),
        (out, channels // groups, kernel, kernel),
        slide,
        last,
        kernels.are_built(),
    )


def describe(signature: Signature) -> str:
    """Batch and sizes in words, other words for other sizes."""
    last = isinstance(signature, ConvolutionSignature) and signature.channels_last
    return f"{signature.n} x {signature.describe()}{', channels last' if last else ''}"


def observe(strategies: Sequence[Strategy]) -> Iterator[tuple[int, int, list[Observation]]]:
    """Takes all timings; yields how many sizes are done, of how many, and the timings so far."""
    device = torch.device("cpu")
    grid: list[Callable[[], list[Observation]]] = [
        lambda signature=signature: _of_strategies(strategies, signature, device) for signature in signatures()
    ]
    grid += [partial(_of_images, *sizes, last) for sizes in IMAGES for last in (False, True)]
    found: list[Observation] = []
    for at, take in enumerate(grid, start=1):
        found += take()
        yield at, len(grid), found


def _of_strategies(strategies: Sequence[Strategy], signature: Signature, device: torch.device) -> list[Observation]:
    costs = {s: s.cost(signature, 4) for s in strategies if s.refuses(signature) is None}
    predicted = BUILT_IN.predict(costs, signature)
    worth = [s for s in costs if predicted[s] <= min(LONGEST, HOPELESS * min(predicted.values()))]
    seconds = measure(worth, signature, torch.float32, device)
    what = describe(signature)
    return [Observation(what, s.name, costs[s], seconds[s.name]) for s in worth]


IMAGES = [  # examples, in, out, size, kernel, stride
    *((32, 3, 64, 32, 3, 1), (32, 64, 64, 32, 3, 1), (32, 128, 128, 16, 3, 1), (32, 256, 256, 8, 3, 1)),
    *((32, 512, 512, 4, 3, 1), (2, 512, 512, 7, 3, 1), (8, 64, 64, 56, 3, 1), (8, 3, 64, 128, 7, 2)),
    *((8, 256, 64, 28, 1, 1), (64, 16, 32, 14, 3, 1)),
]


def _of_images(n: int, channels: int, out: int, size: int, kernel: int, stride: int, last: bool) -> list[Observation]:
    """Forward and input gradient of a convolution, a pool and a norm, in one of the two formats."""
    sizes = _convolution(n, channels, out, size, kernel, stride, 1, last)

    def images(*shape: int) -> torch.Tensor:
        return in_format(torch.randn(*shape), torch.channels_last) if last else torch.randn(*shape)

    x, g = images(n, channels, size, size), images(n, out, *sizes.out_size)
    weight = torch.randn(sizes.shape)
    slide = sizes.geometry
    pooled, indices = F.max_pool2d(g, 2, return_indices=True)
    groups = math.gcd(out, 32)
    scale = torch.ones(out)
    _, mean, rstd = torch.native_group_norm(g, scale, scale, n, out, sizes.positions, groups, 1e-5)

    def convolve() -> None:
        torch.conv2d(x, weight, None, slide.stride, slide.padding)
        how = (slide.stride, slide.padding, slide.dilation, False, [0, 0], 1, [True, False, False])
        torch.ops.aten.convolution_backward(g, x, weight, None, *how)

    def pool() -> None:
        F.max_pool2d(g, 2)
        torch.ops.aten.max_pool2d_with_indices_backward(pooled, g, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)

    def normalise() -> None:
        if last and (made := kernels.group_norm(g, scale, scale, groups, 1e-5)) is not None:
            kernels.group_norm_back(g, g, scale, *made[1:])
            return
        torch.native_group_norm(g, scale, scale, n, out, sizes.positions, groups, 1e-5)
        how = (mean, rstd, scale, n, out, sizes.positions, groups, [True, True, True])
        torch.ops.aten.native_group_norm_backward(g, g, *how)

    seconds = medians({"convolution": convolve, "max_pool": pool, "group_norm": normalise}, torch.device("cpu"))
    work = {
        "convolution": convolution_work(sizes, last),
        "max_pool": (image_work("max_pool", sizes.output_elements, last),),
        "group_norm": (image_work("group_norm", sizes.output_elements, last, kernels.are_built()),),
    }
    what = f"images of {describe(sizes)}"
    return [Observation(what, name, Cost(work[name], 0), seconds[name]) for name in seconds]


def first_touch() -> Rate:
    """What new memory costs, which no timing of a strategy shows: they use the same memory again and again."""
    old = torch.empty(NEW // 4)
    touched = medians({"new": lambda: torch.empty(NEW // 4).fill_(1), "old": lambda: old.fill_(1)}, torch.device("cpu"))
    return Rate(math.inf, NEW / max(touched["new"] - touched["old"], 1e-6), 0.0)


NEW = 64 << 20
"""Bytes: C libraries get as many from the system anew each time."""


def fit(observations: Sequence[Observation], name: str, unseen: Mapping[str, Rate] | None = None) -> Machine:
    """Rates with the least relative error, none of them negative.

    Args:
        observations: The timings.
        name: For reports.
        unseen: Rates of what no timing shows; kinds of work that are not in it either keep the built-in rate.
    """
    kinds = sorted({work.kind for seen in observations for work in seen.cost.work} - UNSEEN)
    columns = {(kind, part): at for at, (kind, part) in enumerate((k, p) for k in kinds for p in PARTS)}
    rows = torch.zeros(len(observations), len(columns), dtype=torch.float64)
    for row, seen in zip(rows, observations, strict=True):
        for work in seen.cost.work:
            for part in PARTS if work.kind in kinds else ():
                row[columns[work.kind, part]] += getattr(work, part) / seen.seconds
    scale = rows.amax(0).clamp(min=1e-300)
    solved, _ = nnls((rows / scale).numpy(), torch.ones(len(observations), dtype=torch.float64).numpy())
    per_unit = dict(zip(columns, (torch.from_numpy(solved) / scale).tolist(), strict=True))
    rates = {**BUILT_IN.rates, **(unseen or {})}
    for kind in kinds:
        flops, moved, calls = (per_unit[kind, part] for part in PARTS)
        start = max(calls, LEAST_PER_CALL) if rows[:, columns[kind, "calls"]].any() else 0.0
        rates[kind] = Rate(1 / flops if flops else math.inf, 1 / moved if moved else math.inf, start)
    return Machine(name, rates)


UNSEEN = {"first_touch"}
"""Work that timings do not show: they use the same memory again and again."""
PARTS = ("flops", "bytes", "calls")
LEAST_PER_CALL = 2e-6
"""Seconds: no kernel starts in less, and timings of large ones cannot tell."""


@dataclass(frozen=True)
class Quality:
    """How well a profile predicts some timings.

    Attributes:
        error: Geometric mean of max(predicted, measured) / min(predicted, measured).
        regret: Geometric mean, over sizes, of the time of the strategy predicted to be best / the best one's.
        worst: The largest such ratio, and the size it belongs to.
    """

    error: float
    regret: float
    worst: tuple[float, str]


def quality(machine: Machine, observations: Sequence[Observation]) -> Quality:
    """How well a profile predicts some timings."""
    errors = [abs(math.log(machine.seconds(seen.cost) / seen.seconds)) for seen in observations]
    by_size: dict[str, list[Observation]] = {}
    for seen in observations:
        by_size.setdefault(seen.what, []).append(seen)
    regrets = {}
    for what, rivals in by_size.items():
        chosen = min(rivals, key=lambda seen: machine.seconds(seen.cost))
        regrets[what] = chosen.seconds / min(seen.seconds for seen in rivals)
    worst = max(regrets, key=regrets.__getitem__)
    return Quality(
        math.exp(statistics.mean(errors)), statistics.geometric_mean(regrets.values()), (regrets[worst], worst)
    )


def profile_name() -> str:
    """For reports."""
    threads = f"{torch.get_num_threads()} threads"
    return f"profile of {processor()}, {threads}, torch {torch.__version__}, kernels {kernels.level()}"


__all__ = ["Observation", "Quality", "describe", "fit", "observe", "profile_name", "quality", "signatures"]
