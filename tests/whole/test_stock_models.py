"""Models as people bring them, against one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import perexfx
from perexfx.bench.models import VGG11, AlexNet, LanguageModel, ResNet18, ViT, mlp, small_cnn
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted

N = 3


def images(*shape: int) -> Batch:
    torch.manual_seed(1)
    return Batch((torch.randn(N, *shape),), torch.randint(0, 10, (N,)))


def tokens(vocabulary: int, length: int) -> Batch:
    torch.manual_seed(1)
    return Batch((torch.randint(0, vocabulary, (N, length)),), torch.randint(0, vocabulary, (N, length)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "resnet18": (lambda: ResNet18(width=16), images(3, 32, 32)),
    "resnet18_large_stem": (lambda: ResNet18(width=8, small_images=False), images(3, 64, 64)),
    "vgg11": (lambda: VGG11(width=16), images(3, 32, 32)),
    "alexnet": (AlexNet, images(3, 64, 64)),
    "vit": (lambda: ViT(image=32, patch=8, width=32, depth=3, heads=4), images(3, 32, 32)),
    "language_model": (lambda: LanguageModel(50, 32, 2, 4, 20), tokens(50, 12)),
    "small_cnn": (small_cnn, images(1, 28, 28)),
    "mlp": (mlp, images(784)),
}


def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("strategy", ["auto", "materialize", "gram", "loop_norms"])
@pytest.mark.parametrize("name", MODELS)
def test_stock_model(name: str, strategy: str) -> None:
    if name in ("mlp", "language_model") and strategy == "loop_norms":
        strategy = "auto"
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model, batch = make().double(), batch.double()
    gradients = one_at_a_time(model, batch, loss)
    norms = norms_of(gradients)
    clip_norm = float(norms.median())
    gm = perexfx.transform(model, batch.inputs, clip_norm=clip_norm, strategy=strategy)
    found = train_step(gm, batch, loss)
    factors = (clip_norm / norms).clamp(max=1) / N
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, name)
    assert_close(found, weighted(gradients, factors), 1e-9, name)
