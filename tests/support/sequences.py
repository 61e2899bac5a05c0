"""A batch of sequences, and whether a step over it is exact."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.losses import squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


def a_batch(n: int = 4, t: int = 7, width: int = 12) -> Batch:
    torch.manual_seed(1)
    return Batch((torch.randn(n, t, width).double(),), torch.randn(n).double())


def assert_exact(gm: nn.Module, model: nn.Module, batch: Batch, clip_norm: float = 0.1) -> None:
    gradients = one_at_a_time(model, batch, squares)
    norms = norms_of(gradients)
    found = train_step(gm, batch, squares)
    torch.testing.assert_close(gm.perexfx.norms, norms, rtol=1e-9, atol=0.0)
    factors = (clip_norm / norms).clamp(max=1) / len(norms)
    assert_close(found, weighted(gradients, factors), 1e-9, "clipped sums")
