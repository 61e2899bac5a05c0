"""A small network that has what training loops meet, and a batch for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.oracle import Batch


class Net(nn.Module):
    """Convolution, norm, dropout (as a module and as a function), a buffer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.register_buffer("offset", torch.ones(4))
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        self.head = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x).mean((2, 3)) + self.offset
        return self.head(F.dropout(h, 0.5, training=self.training))


def build(training: bool = False) -> tuple[Net, Batch]:
    torch.manual_seed(0)
    return Net().double().train(training), Batch((torch.randn(6, 2, 5, 5).double(),), torch.randn(6).double())
