"""Differentially private training on real images, in plain torch on top of perexfx.

scikit-learn's 1,797 handwritten digits, a small GroupNorm CNN, Poisson-sampled batches, clipping by
`perexfx.transform`, Gaussian noise and SGD. Run it with `make demo` or `perexfx demo`.

Promises: what is trained on and compared is real; every view of the trained model is left behind as a file.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import perexfx
from perexfx.bench.measure import timed
from perexfx.runtime import Transformed
from perexfx.views.files import make_folder

EPOCHS = 30
EXPECTED_BATCH = 128
CLIP_NORM = 1.0
NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 0.5


def make_model() -> nn.Module:
    """A small CNN without batch statistics."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.ReLU(inplace=True)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels, to train on and to test: `(train_x, test_x, train_y, test_y)`."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    return train_x, test_x, train_y, test_y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images whose class is found."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def train(x: Tensor, y: Tensor, *, private: bool) -> tuple[nn.Module, Any, Tensor]:
    """One training loop for both. Returns: the model, what was called in its place, and all norms seen."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE if private else 0.1, momentum=0.9 * (not private))
    step_model: Any = model
    if private:  # the one line that changes
        step_model = perexfx.transform(model, x[:EXPECTED_BATCH], clip_norm=CLIP_NORM, loss_reduction="sum")

    rate = EXPECTED_BATCH / len(x)
    steps = tqdm(range(round(EPOCHS / rate)), desc="private " if private else "ordinary", unit="step")
    norms = []
    for _ in steps:
        chosen = torch.rand(len(x)) < rate  # Poisson sampling: every batch has another size, and may be empty
        optimizer.zero_grad()
        loss = F.cross_entropy(step_model(x[chosen]), y[chosen], reduction="sum")
        loss.backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            if private:
                parameter.grad += NOISE_MULTIPLIER * CLIP_NORM * torch.randn_like(parameter)
            parameter.grad /= EXPECTED_BATCH
        optimizer.step()
        steps.set_postfix(loss=f"{loss.item() / max(1, int(chosen.sum())):.3f}")
        if private:
            norms.append(step_model.perexfx.norms)
    return model, step_model, torch.cat(norms) if norms else torch.empty(0)


def step_times(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Milliseconds of an ordinary and of a clipped step, taken in turn, and their median ratio."""
    model = make_model()
    transformed = perexfx.transform(model, x)

    def step(module: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(module(x), y).backward()

    timing = timed({"ordinary": lambda: step(model), "clipped": lambda: step(transformed)}, rounds=40)
    return timing.median("ordinary") * 1e3, timing.median("clipped") * 1e3, timing.ratio("clipped")


def plot_norms(norms: Tensor, path: Path) -> None:
    """A histogram of the norms at the beginning and at the end of the training."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    third = len(norms) // 3
    bins = torch.logspace(-3, 2.5, 80).tolist()
    for name, part in (("first third of the steps", norms[:third]), ("last third", norms[-third:])):
        axes.hist(part.clamp(min=1e-3).numpy(), bins=bins, alpha=0.6, label=name)
    axes.axvline(CLIP_NORM, color="black", linestyle="--", label=f"clip_norm = {CLIP_NORM:g}")
    axes.set_xscale("log")
    axes.set_xlabel("gradient norm of an example")
    axes.set_ylabel("examples")
    axes.set_title(f"Per-example gradient norms, {len(norms):,} in all, median {statistics.median(norms.tolist()):.2f}")
    axes.legend()
    figure.savefig(path, dpi=150)


def run(out: Path) -> None:
    """Trains, compares, prints what came of it, and leaves report, graph, ONNX model and histogram in a folder.

    Raises:
        ArgumentError: The folder cannot be made.
    """
    make_folder(out)
    train_x, test_x, train_y, test_y = load_images()
    ordinary, _, _ = train(train_x, train_y, private=False)
    private, transformed, norms = train(train_x, train_y, private=True)
    x, y = train_x[:EXPECTED_BATCH], train_y[:EXPECTED_BATCH]
    ordinary_ms, clipped_ms, ratio = step_times(x, y)
    leave_behind(transformed, x, norms, out)

    print(f"\n{perexfx.report(transformed)}\n")
    print(f"test accuracy, ordinary training              {accuracy(ordinary, test_x, test_y):.1%}")
    print(f"test accuracy, clipped with noise             {accuracy(private, test_x, test_y):.1%}")
    print(f"    clip_norm {CLIP_NORM:g}, noise multiplier {NOISE_MULTIPLIER:g}, expected batch {EXPECTED_BATCH}")
    print(f"examples clipped                              {float((norms > CLIP_NORM).float().mean()):.1%}")
    print(f"step of {EXPECTED_BATCH}: ordinary {ordinary_ms:.2f} ms, clipped {clipped_ms:.2f} ms, ratio {ratio:.2f}\n")
    for name, what in FILES.items():
        print(f"{what:<48} {out / name}")


FILES = {
    "report.html": "what the planner chose, and over what",
    "graph.html": "the graph before and after (open in a browser)",
    "model.onnx": "the rewritten forward, for Netron and runtimes",
    "norms.png": "histogram of the norms",
}
"""What is left behind."""


def leave_behind(transformed: Transformed, x: Tensor, norms: Tensor, out: Path) -> None:
    """Writes every view of the transformed model."""
    transformed(x)  # the last batch of the training had another size
    perexfx.verify(transformed)
    perexfx.report(transformed).to_html(out / "report.html")
    perexfx.visualize(transformed, out / "graph.html")
    perexfx.export_onnx(transformed, out / "model.onnx", x)
    plot_norms(norms, out / "norms.png")
