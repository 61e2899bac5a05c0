"""What a step allocates."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexfx.bench.memory import peak_allocation


def step_of(module: nn.Module, x: Tensor) -> Callable[[], object]:
    trainable = list(module.parameters())

    def loss() -> Tensor:
        logits = module(x).flatten(0, -2)
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    return lambda: torch.autograd.grad(loss(), trainable)


def measured(step: Callable[[], object]) -> int:
    step()
    return peak_allocation(step, torch.device("cpu"))
