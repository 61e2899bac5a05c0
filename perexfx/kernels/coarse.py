"""Images at half the resolution: how they are made, read by pooled kernels, pooled again, and made whole.

Promises: every function is one node of a graph, whoever traces it; `[n, C, *size]` in and out; sizes of what comes out
are those that are asked for. A fine size N has coarse size ceil(N / 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from perexfx.kernels.pooled import Slides, coarse_axes, coarse_axis, is_traced

Size = tuple[int, ...]
Windows = tuple[tuple[int, int, int], ...]
"""Size, stride and first pixel of a window, by axis."""


def half(size: Sequence[int]) -> Size:
    """The coarse size of a fine one."""
    return tuple(-(-n // 2) for n in size)


def _one_node(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that whoever traces sees as one call."""

    @wraps(function)
    def call(*args: Any) -> Tensor:
        given = [arg for arg in args if isinstance(arg, Tensor) or hasattr(arg, "__torch_function__")]
        if has_torch_function(given):
            return handle_torch_function(call, given, *args)
        return function(*args)

    return call


@_one_node
def shrink(image: Tensor, pool: str) -> Tensor:
    """An image at half the resolution; pixels at the edge are made of what they hold.

    Args:
        image: Shape `[n, C, *size]`.
        pool: "average" or "max".
    """
    if pool == "max":
        return F.max_pool2d(image, 2, ceil_mode=True)
    return F.avg_pool2d(image, 2, ceil_mode=True)


@_one_node
def grow(image: Tensor, size: Size) -> Tensor:
    """A coarse image at its fine size: every pixel is four, but at edges that lack some."""
    return F.interpolate(image, scale_factor=2, mode="nearest")[:, :, : size[0], : size[1]]


@_one_node
def pooled_tokens(table: Tensor, size: Size, prefix: int) -> Tensor:
    """A table of tokens at half the resolution: means over blocks of two by two.

    Args:
        table: Shape `[..., prefix + T, d]`.
        size: Of the map that the tokens are of, T in all.
        prefix: How many tokens before them are of no place.
    """
    first, tokens = table[..., :prefix, :], table[..., prefix:, :]
    lead, d = tokens.shape[:-2], tokens.shape[-1]
    images = tokens.transpose(-1, -2).reshape(-1, d, *size)
    pooled = F.avg_pool2d(images, 2, ceil_mode=True).flatten(2).transpose(1, 2).reshape(*lead, -1, d)
    return torch.cat([first, pooled], -2) if prefix else pooled


@_one_node
def at_side(image: Tensor, side: Tensor, slides: Slides, out: Size) -> Tensor:
    """What a pooled kernel slides over, from the first pixel that it reads to the last, with zeros around the image.

    Args:
        image: Shape `[n, C, *size]`.
        side: The side by axis, `[axes]`, integers 0 or 1.
        slides: How the fine kernel slides.
        out: Size of the output.
    """
    axes = coarse_axes(slides)
    lengths = [_read(axis.size, slide[1], axis.dilation, o) for axis, slide, o in zip(axes, slides, out, strict=True)]
    return _cut_at_side(image, side, [axis.lows for axis in axes], lengths)


def _cut_at_side(image: Tensor, side: Tensor, firsts: Sequence[tuple[int, int]], lengths: Sequence[int]) -> Tensor:
    """Some pixels from a first one on, which depends on the side; traced, the side stays a value of the graph."""
    if not is_traced():
        return _cut(image, [first[b] for first, b in zip(firsts, side.tolist(), strict=True)], lengths)
    least = [min(first) for first in firsts]
    most = [max(first) - low + length for first, low, length in zip(firsts, least, lengths, strict=True)]
    image = _cut(image, least, most)
    for at, (first, low, length) in enumerate(zip(firsts, least, lengths, strict=True)):
        both = torch.tensor([first_b - low for first_b in first], device=side.device)
        shift = both.index_select(0, side[at : at + 1]).to(image.device)
        image = image.index_select(2 + at, torch.arange(length, device=image.device) + shift)
    return image


def _read(taps: int, stride: int, dilation: int, out: int) -> int:
    """How many pixels a kernel reads."""
    return (out - 1) * stride + dilation * (taps - 1) + 1


def _cut(image: Tensor, first: Sequence[int], lengths: Sequence[int], value: float = 0.0) -> Tensor:
    """Some pixels from a first one on, which may lie outside, where a value is."""
    pads = [
        amount
        for low, length, n in reversed(list(zip(first, lengths, image.shape[2:], strict=True)))
        for amount in (-low, length + low - n)
    ]
    return F.pad(image, pads, value=value) if any(pads) else image


@_one_node
def cut(image: Tensor, first: Size, lengths: Size) -> Tensor:
    """Some pixels from a first one on, with zeros outside of the image."""
    return _cut(image, first, lengths)


@_one_node
def at_side_of(image: Tensor, side: Tensor, slides: Slides, out: Size) -> Tensor:
    """Of what a pooled kernel was spread over (a transposed convolution without padding), the pixels of the image.

    Args:
        image: From pixel `low` of the side on.
        side: The side by axis, `[axes]`, integers 0 or 1.
        slides: How the fine kernel slides.
        out: Size of the image.
    """
    firsts = [(-axis.lows[0], -axis.lows[1]) for axis in coarse_axes(slides)]
    return _cut_at_side(image, side, firsts, out)


def pool_windows(kernel: Size, stride: Size, padding: Size, dilation: Size) -> tuple[Windows, tuple[Size, ...]]:
    """Windows over the coarse image, and how many fine pixels each of their pixels stands for.

    Those that tile the image stay as large as they were; of others it is what side 0 reads.
    """
    windows, counts = [], []
    for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True):
        if k == s and p == 0 and d == 1:
            windows.append((k, s, 0))
            counts.append((1,) * k)
            continue
        axis = coarse_axis(k, s, p, 1 if d == 1 else d)
        size = axis.dilation * (axis.size - 1) + 1
        found = [0] * size
        for place in axis.places[0]:
            found[place * axis.dilation] += 1
        windows.append((size, s, axis.lows[0]))
        counts.append(tuple(found))
    return tuple(windows), tuple(counts)


@_one_node
def coarse_max_pool(image: Tensor, windows: Windows, out: Size) -> Tensor:
    """The largest of each window; windows that reach over the edge hold less."""
    kernel, stride, first = zip(*windows, strict=True)
    lengths = [_read(k, s, 1, o) for (k, s, _), o in zip(windows, out, strict=True)]
    return F.max_pool2d(_cut(image, first, lengths, float("-inf")), kernel, stride)


@_one_node
def coarse_avg_pool(image: Tensor, windows: Windows, counts: tuple[Size, ...], out: Size) -> Tensor:
    """The mean of each window, over as many fine pixels as its pixels stand for; what lies outside counts as zeros.

    Windows that tile the image are means of what they hold.
    """
    kernel, stride, first = zip(*windows, strict=True)
    lengths = [_read(k, s, 1, o) for (k, s, _), o in zip(windows, out, strict=True)]
    rows, columns = (image.new_tensor(count) / sum(count) for count in counts)
    channels = image.shape[1]
    weight = torch.outer(rows, columns).expand(channels, 1, *kernel)
    mean = F.conv2d(_cut(image, first, lengths), weight, None, stride, 0, 1, channels)
    if any(low for low in first) or set(counts[0] + counts[1]) != {1}:
        return mean
    held = F.conv2d(_cut(image.new_ones(1, 1, *image.shape[2:]), first, lengths), weight[:1], None, stride)
    return mean / held


__all__ = [
    "Size",
    "Windows",
    "at_side",
    "at_side_of",
    "coarse_avg_pool",
    "coarse_max_pool",
    "cut",
    "grow",
    "half",
    "pool_windows",
    "pooled_tokens",
    "shrink",
]
