"""What is measured: a model, a batch and a loss, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexfx.bench import models


@dataclass(frozen=True)
class Workload:
    """One training step to measure.

    Attributes:
        name: Of the model and its input.
        model: Makes it, with random weights.
        inputs: Makes a batch.
        targets: Makes its targets.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples (over positions first, where there are several)."""
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def _images(name: str, model: Callable[[], nn.Module], n: int, *shape: int) -> Workload:
    return Workload(name, model, lambda: torch.randn(n, *shape), lambda: torch.randint(0, 10, (n,)))


def _tokens(name: str, model: Callable[[], nn.Module], n: int, length: int, vocabulary: int) -> Workload:
    def draw() -> Tensor:
        return torch.randint(0, vocabulary, (n, length))

    return Workload(name, model, draw, draw)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _images("mlp", models.mlp, 256, 784),
        _images("cnn-26k", models.small_cnn, 256, 1, 28, 28),
        _images("resnet18-32", models.ResNet18, 32, 3, 32, 32),
        _images("resnet18-224", lambda: models.ResNet18(small_images=False), 16, 3, 224, 224),
        _images("vgg11-32", models.VGG11, 64, 3, 32, 32),
        _images("alexnet-256", models.AlexNet, 16, 3, 256, 256),
        _images("vit-tiny-224", models.ViT, 16, 3, 224, 224),
        _images("lstm-128", models.SequenceClassifier, 64, 64, 128),
        _tokens("transformer-128", models.LanguageModel, 32, 128, 8000),
    )
}
