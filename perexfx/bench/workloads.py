"""What is measured: a model, a batch and a loss, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexfx.bench import models


@dataclass(frozen=True)
class Workload:
    """One training step to measure. It can be pickled: memory is measured in other processes.

    Attributes:
        name: Of the model and its input.
        model: Makes it, with random weights.
        inputs: Makes a batch.
        targets: Makes its targets.
        is_small: Whether its step is mostly Python: `perexfx.compile_step` is measured too.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: Callable[[], Tensor]
    is_small: bool = False

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean over examples (over positions first, where there are several)."""
        return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def numbers(name: str, model: Callable[[], nn.Module], n: int, *shape: int, is_small: bool = False) -> Workload:
    """Examples of random numbers, in ten classes."""
    return Workload(name, model, partial(torch.randn, n, *shape), partial(torch.randint, 0, 10, (n,)), is_small)


def tokens(name: str, model: Callable[[], nn.Module], n: int, length: int, vocabulary: int) -> Workload:
    """Random tokens, each with a random one to predict."""
    draw = partial(torch.randint, 0, vocabulary, (n, length))
    return Workload(name, model, draw, draw)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        numbers("mlp", models.mlp, 256, 784, is_small=True),
        numbers("cnn-26k", models.small_cnn, 256, 1, 28, 28, is_small=True),
        numbers("resnet18-32", models.ResNet18, 32, 3, 32, 32),
        numbers("resnet18-224", partial(models.ResNet18, small_images=False), 16, 3, 224, 224),
        numbers("vgg11-32", models.VGG11, 64, 3, 32, 32),
        numbers("alexnet-256", models.AlexNet, 16, 3, 256, 256),
        numbers("vit-tiny-224", models.ViT, 16, 3, 224, 224),
        numbers("lstm-128", models.SequenceClassifier, 64, 64, 128, is_small=True),
        tokens("transformer-128", models.LanguageModel, 32, 128, 8000),
    )
}
