"""Models that several files of tests share: one of the size that people draw, and small ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(4, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.GroupNorm(4, width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.GroupNorm(4, out)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.GroupNorm(4, out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(self.conv1(x)))
        h = self.relu(self.norm2(self.conv2(h)))
        return self.relu(self.norm3(self.conv3(h)) + self.downsample(x))


class ResNet50(nn.Module):
    """He et al. 2015, arXiv:1512.03385, with GroupNorm and narrower layers: the same graph."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(4, width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        channels = width
        for at, blocks in enumerate((3, 4, 6, 3), start=1):
            layer = []
            for block in range(blocks):
                layer.append(Bottleneck(channels, width * 2 ** (at - 1), 2 if block == 0 and at > 1 else 1))
                channels = 4 * width * 2 ** (at - 1)
            setattr(self, f"layer{at}", nn.Sequential(*layer))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.maxpool(self.relu(self.norm1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(self.avgpool(h).flatten(1))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Mixed(nn.Module):
    """A site of every kind that the report words differently."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(100, 16), nn.Parameter(torch.zeros(12, 16))
        self.conv, self.norm = nn.Conv1d(16, 32, 3, stride=2, padding=1, groups=2), nn.GroupNorm(4, 32)
        self.shared, self.head = nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = (self.embedding(ids) + self.positions).transpose(1, 2)
        x = self.norm(self.conv(x)).mean(2)
        return self.head(self.shared(torch.tanh(self.shared(x))))
