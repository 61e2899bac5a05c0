"""The models that the papers measured, in plain torch, with GroupNorm in the place of BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perexfx.bench.models import BasicBlock, TransformerBlock, norm_of_channels

# Rochette, Manoel, Tramel 2019


def toy_channels(layers: int, rate: float, first: int = 25) -> list[int]:
    """Output channels of each layer: the first's, growing by a rate."""
    return [round(first * rate**at) for at in range(layers)]


def toy(channels: Sequence[int], kernel: int, pixels: int) -> nn.Module:
    """Convolutions (stride 1, padding 2) with ReLU, a max-pool after every second, and one linear layer to ten.

    Args:
        channels: Of each layer's output; three go in.
        kernel: Size of every kernel.
        pixels: Height and width of the images.
    """
    layers: list[nn.Module] = []
    before, size = 3, pixels
    for at, after in enumerate(channels, start=1):
        layers += [nn.Conv2d(before, after, kernel, padding=2), nn.ReLU(inplace=True)]
        before, size = after, size + 5 - kernel
        if at % 2 == 0:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * size * size, 10))


VGG_LAYERS = {
    11: (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"),
    13: (1, 1, "M", 2, 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"),
    16: (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"),
    19: (1, 1, "M", 2, 2, "M", 4, 4, 4, 4, "M", 8, 8, 8, 8, "M", 8, 8, 8, 8, "M"),
}
"""Depth -> channels by 64 of each convolution, and pools (Simonyan & Zisserman 2015, arXiv:1409.1556, table 1)."""


def vgg(depth: int, *, pixels: int, normalized: bool = False, width: int = 64) -> nn.Module:
    """VGG, with its classifier of three linear layers for large images, of one for those of 32 pixels.

    Args:
        depth: 11, 13, 16 or 19.
        pixels: Height and width of the images.
        normalized: Whether GroupNorm follows each convolution.
        width: Channels of the first convolution.
    """
    layers: list[nn.Module] = []
    before = 3
    for size in VGG_LAYERS[depth]:
        if size == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        after = int(size) * width
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        if normalized:
            layers.append(norm_of_channels(after))
        layers.append(nn.ReLU(inplace=True))
        before = after
    side = pixels // 32
    features = before * side * side
    if side == 1:
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 10))
    hidden = 8 * before
    dense = (nn.Linear(features, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True))
    return nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(hidden, 10))


# Lee & Kifer 2021


def conv_net(pixels: int = 28) -> nn.Module:
    """Two convolutions of 20 and 50 channels, kernel 5, each with a max-pool, and two linear layers."""
    size = ((pixels - 4) // 2 - 4) // 2
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(50 * size * size, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


class OfRows(nn.Module):
    """A recurrent layer over the rows of an image, and a linear layer on its last output."""

    def __init__(self, kind: str, pixels: int = 28, width: int = 128) -> None:
        super().__init__()
        layer = {"rnn": nn.RNN, "lstm": nn.LSTM}[kind]
        self.layer, self.head = layer(pixels, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Rows `[B, H, W]` to logits."""
        return self.head(self.layer(x)[0][:, -1])


class OneLayerTransformer(nn.Module):
    """An embedding, one transformer layer over 128 tokens, and a linear layer on the mean."""

    def __init__(self, vocabulary: int = 10_000, width: int = 128, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.block, self.head = TransformerBlock(width, 4, causal=False), nn.Linear(width, 10)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[B, T]` to logits."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.block(x).mean(1))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, and a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(in_channels, width, 1, bias=False), norm_of_channels(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), norm_of_channels(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, out, 1, bias=False), norm_of_channels(out)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), norm_of_channels(out))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`."""
        return (self.body(x) + self.shortcut(x)).relu()


RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Depth -> blocks of each stage (He et al. 2016, arXiv:1512.03385, table 1)."""


def resnet(depth: int, width: int = 64) -> nn.Module:
    """ResNet for images of 32 pixels: one 3x3 convolution for a stem.

    Args:
        depth: 18, 34, 50 or 101; the last two have bottlenecks.
        width: Channels of the stem.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), norm_of_channels(width), nn.ReLU(True)]
    channels = width
    for stage, blocks in enumerate(RESNET_BLOCKS[depth]):
        for block in range(blocks):
            stride, wide = 2 if stage > 0 and block == 0 else 1, width << stage
            if depth >= 50:
                layers.append(Bottleneck(channels, wide, stride))
                channels = 4 * wide
            else:
                layers.append(BasicBlock(channels, wide, stride))
                channels = wide
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


__all__ = [
    "OfRows",
    "OneLayerTransformer",
    "conv_net",
    "norm_of_channels",
    "resnet",
    "toy",
    "toy_channels",
    "vgg",
]
