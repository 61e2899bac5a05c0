"""What becomes of operations on coarse images: those that are known, and those that read grown ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx


class _Around(nn.Module):
    """An operation between two convolutions."""

    def __init__(self, operation: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.operation, self.last = nn.Conv2d(3, 4, 3, padding=1), operation, nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self.first(x))).mean((2, 3))


COARSE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 4),
    "silu times": (lambda x: F.silu(x) * 2 + 1, 4),
    "module": (nn.Hardswish(), 4),
    "identity": (nn.Identity(), 4),
    "dropout": (nn.Dropout(0.1), 4),
    "dropout of maps": (nn.Dropout2d(0.1), 4),
    "prelu": (nn.PReLU(4), 4),
    "batch norm": (nn.BatchNorm2d(4), 4),
    "group norm": (nn.GroupNorm(2, 4), 4),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), 4),
    "local response": (nn.LocalResponseNorm(2), 4),
    "gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 4),
    "per channel": (lambda x: x * torch.arange(4.0)[:, None, None], 4),
    "sum of two": (lambda x: x + F.gelu(x), 4),
    "concatenation": (lambda x: torch.cat([x, -x], dim=1), 8),
    "parts": (lambda x: torch.cat(x.chunk(2, 1)[1:] + x.split(2, dim=1)[:1], 1), 4),
    "channels": (lambda x: x[:, 1:3], 2),
    "softmax": (lambda x: torch.softmax(x, dim=1), 4),
    "softmax module": (nn.Softmax2d(), 4),
    "glu": (nn.GLU(1), 2),
    "normalized": (lambda x: F.normalize(x, dim=1), 4),
    "shuffled": (nn.ChannelShuffle(2), 4),
    "mean of channels": (lambda x: x.mean(1, keepdim=True), 1),
    "max pool": (nn.MaxPool2d(3, 2, 1), 4),
    "max pool function": (lambda x: F.max_pool2d(x, 2), 4),
    "average pool": (nn.AvgPool2d(2), 4),
    "average pool that overlaps": (lambda x: F.avg_pool2d(x, 3, 2, 1), 4),
    "resized": (lambda x: F.interpolate(x, scale_factor=2), 4),
    "resized to a size": (lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"), 4),
    "resized as another": (lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:]), 4),
    "upsample": (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), 4),
    "contiguous": (lambda x: x.contiguous(), 4),
    "clamped": (lambda x: x.clamp(-1, 1), 4),
    "by its type": (lambda x: x * torch.ones((), dtype=x.dtype, device=x.device), 4),
}

WHOLE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "layer norm over space": (nn.LayerNorm([4, 14, 14]), 4),
    "padded": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 4),
    "flipped": (lambda x: x.flip(3), 4),
    "cut": (lambda x: x[:, :, 2:], 4),
    "softmax over rows": (lambda x: torch.softmax(x, dim=3), 4),
    "pixels to channels": (lambda x: F.pixel_unshuffle(x, 2), 16),
    "summed over space": (lambda x: x * x.sum((2, 3), keepdim=True), 4),
    "per row": (lambda x: x * torch.arange(14.0)[:, None], 4),
    "pool with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], 4),
    "pool with a divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), 4),
    "transposed": (lambda x: x.transpose(2, 3), 4),
}


def sides_of(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    return tuple(change.after for change in perexfx.downsample(model, x).rewriting.changes)


@pytest.mark.parametrize("name", COARSE)
def test_known_operations_stay_coarse(name: str) -> None:
    operation, channels = COARSE[name]
    x = torch.randn(2, 3, 14, 14)
    model = _Around(operation, channels)
    reduced = perexfx.downsample(model, x)
    assert reduced(x).shape == model(x).shape
    assert not [change for change in reduced.rewriting.changes if "grown" in change.after]


@pytest.mark.parametrize("name", WHOLE)
def test_others_read_grown_images(name: str) -> None:
    operation, channels = WHOLE[name]
    x = torch.randn(2, 3, 14, 14)
    model = _Around(operation, channels)
    reduced = perexfx.downsample(model, x)
    assert reduced(x).shape == model(x).shape
    assert [change for change in reduced.rewriting.changes if change.after.endswith("grown to 14 x 14")]


SLIDES = [
    *((1, 1, 0, 1), (1, 2, 0, 1), (2, 2, 0, 1), (3, 2, 1, 1), (4, 2, 1, 1), (5, 1, 2, 1), (7, 2, 3, 1)),
    *((3, 1, 2, 2), (3, 1, 3, 3)),
]
"""Taps, stride, padding and dilation."""


@pytest.mark.parametrize("size", [(27, 22), (28, 28), (15, 33)])
@pytest.mark.parametrize("kernel", ["side", "galerkin"])
@pytest.mark.parametrize("slide", SLIDES)
def test_sizes_are_half(slide: tuple[int, int, int, int], kernel: str, size: tuple[int, int]) -> None:
    """Branches of other kernels and strides meet at the same size."""
    taps, stride, padding, dilation = slide
    conv = nn.Conv2d(3, 4, taps, stride, padding, dilation)
    out = conv(torch.zeros(1, 3, *size)).shape[2:]
    other = nn.Conv2d(3, 4, 1, stride)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = conv, other

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.conv(x), self.other(x)
            return torch.cat([y, z[:, :, : out[0], : out[1]] if z.shape != y.shape else z], 1)

    x = torch.randn(2, 3, *size)
    if other(x).shape != conv(x).shape:
        return
    reduced = perexfx.downsample(Both(), x, kernel=kernel)
    assert reduced(x).shape == (2, 8, *out)
    assert not [c for c in reduced.rewriting.changes if "grown" in c.after and c.place.node != "output"]


SIZES_READ: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view by the image's size": lambda h, x: h.view(h.size(0), -1)[:, :3],
    "view by the input's size": lambda h, x: h.view(x.shape[0], -1)[:, :3],
    "all sizes": lambda h, x: _flat(h),
    "its own shape": lambda h, x: (h * 2).view(h.shape).mean((2, 3)),
    "a size by name": lambda h, x: h.mean((2, 3)) * h.size(dim=2),
    "the last sizes": lambda h, x: h.mean((2, 3)) * h.shape[-1] * h.shape[2:][0],
    "squeeze and excitation": lambda h, x: (h * h.mean((2, 3)).view(h.shape[0], h.size(1), 1, 1)).mean((2, 3)),
    "half of it": lambda h, x: F.interpolate(h, size=(h.shape[2] // 2, h.shape[3] // 2)).mean((2, 3)),
    "rows alone": lambda h, x: (h * F.adaptive_avg_pool2d(h, (None, 1))).mean((2, 3)),
    "a mask": lambda h, x: (h * torch.ones(1, 1, 14, 14, dtype=torch.bool)).mean((2, 3)),
    "by keywords": lambda h, x: torch.mean(input=torch.cat(tensors=[h, h], dim=1), dim=(2, 3)),
    "parts by keywords": lambda h, x: torch.cat(torch.chunk(input=h, chunks=2, dim=1), 1).mean((2, 3)),
}


def _flat(h: Tensor) -> Tensor:
    b, c, height, width = h.shape
    return h.reshape(b, c * height * width)[:, :3]


class _Reads(nn.Module):
    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.read = nn.Conv2d(3, 4, 3, padding=1), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.first(x), x)


@pytest.mark.parametrize("name", SIZES_READ)
def test_sizes_are_read_and_examples_are_still_told_apart(name: str) -> None:
    x, model = torch.randn(3, 3, 14, 14), _Reads(SIZES_READ[name])
    reduced = perexfx.downsample(model, x)
    assert reduced(x).shape == model(x).shape
    gm = perexfx.transform(reduced, x)
    gm(x).square().sum().backward()
    assert gm.perexfx.norms is not None
    assert gm(torch.randn(5, 3, 14, 14)).shape == model(torch.randn(5, 3, 14, 14)).shape


@pytest.mark.parametrize(
    "write",
    [lambda h: h.permute(0, 2, 3, 1).mul_(100.0), lambda h: h[:, :, 2:4].mul_(5), lambda h: h.view(2, 4, -1).add_(1)],
)
def test_writes_that_would_be_lost_are_refused(write: Callable[[Tensor], Tensor]) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            write(h)
            return h.mean((2, 3))

    with pytest.raises(perexfx.RefusedError, match="by way of a view of it"):
        perexfx.downsample(Writes(), torch.randn(2, 3, 14, 14))
