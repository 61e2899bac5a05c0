"""The models that are measured, in plain torch, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32


def norm_of_channels(channels: int) -> nn.Module:
    """GroupNorm of 32 groups, or of as many as there are channels."""
    return nn.GroupNorm(min(GROUPS, channels), channels)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = norm_of_channels(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = norm_of_channels(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_of_channels(out_channels)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`."""
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 with GroupNorm (He et al. 2016, arXiv:1512.03385).

    Args:
        classes: Number of logits.
        small_images: The stem of the CIFAR variant: one 3x3 convolution and no pooling.
        width: Channels of the first stage.
        blocks_per_stage: Two in ResNet-18.
    """

    def __init__(
        self, classes: int = 10, small_images: bool = True, width: int = 64, blocks_per_stage: int = 2
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small_images else nn.Conv2d(3, width, 7, 2, 3, bias=False)
        pool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(stem, norm_of_channels(width), nn.ReLU(inplace=True), pool)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to logits."""
        x = self.blocks(self.stem(x))
        return self.head(x.mean((2, 3)))


class VGG11(nn.Module):
    """VGG-11 (Simonyan & Zisserman 2015, arXiv:1409.1556) with the small classifier of its CIFAR variants."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for size in (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"):
            if size == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            assert isinstance(size, int)
            layers += [nn.Conv2d(channels, size * width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = size * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, 32 k, 32 k]` to logits."""
        return self.classifier(self.features(x).amax((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929); the default sizes are ViT-tiny."""

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class AlexNet(nn.Module):
    """AlexNet as in Krizhevsky 2014 (arXiv:1404.5997), without dropout."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), relu, nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), relu, nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), relu),
            *(nn.Conv2d(384, 256, 3, padding=1), relu),
            *(nn.Conv2d(256, 256, 3, padding=1), relu, nn.MaxPool2d(3, 2)),
            nn.AdaptiveAvgPool2d(6),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(256 * 36, 4096), relu), *(nn.Linear(4096, 4096), relu), nn.Linear(4096, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to logits."""
        return self.classifier(self.features(x))


class LanguageModel(nn.Module):
    """A causal transformer over tokens, with learned positions and an untied head."""

    def __init__(self, vocabulary: int = 8000, width: int = 256, depth: int = 4, heads: int = 4, length: int = 128):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids `[B, T]` to logits `[B, T, V]`."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class SequenceClassifier(nn.Module):
    """An LSTM over a sequence of features, and a linear layer on its last output."""

    def __init__(self, features: int = 128, width: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(features, width, batch_first=True), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features `[B, T, features]` to logits."""
        return self.head(self.lstm(x)[0][:, -1])


def small_cnn() -> nn.Module:
    """The CNN of 26,010 parameters that differentially private MNIST examples use (Papernot et al. 2019)."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()),
        *(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def mlp(sizes: Sequence[int] = (784, 128, 256, 10)) -> nn.Module:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
