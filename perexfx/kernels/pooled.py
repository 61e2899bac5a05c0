"""Kernels of convolutions at half the resolution: the taps that fall on one coarse pixel are added up.

For the output at fine position `2 O + b` (side b, 0 or 1), tap t of a kernel with stride s, dilation d and padding p
reads coarse pixel `s O + floor((s b + d t - p) / 2)`: the coarse kernel is, pixel by pixel, the sum of such taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from perexfx.kernels.thin import thin_product
from perexfx.kernels.watched import is_watched

SIDES = (0, 1)


@dataclass(frozen=True)
class CoarseAxis:
    """How a kernel slides over one axis of the coarse image.

    Attributes:
        taps: Of the fine kernel.
        places: Side -> the place of each tap in the coarse kernel.
        size: Of the coarse kernel, for either side.
        lows: Side -> the first coarse pixel that the output at 0 reads.
        dilation: Of the coarse kernel.
    """

    taps: int
    places: tuple[tuple[int, ...], tuple[int, ...]]
    size: int
    lows: tuple[int, int]
    dilation: int

    @property
    def is_whole(self) -> bool:
        """Whether the coarse kernel is the fine one, whatever the side."""
        return self.size == self.taps and self.places == (tuple(range(self.taps)),) * 2


@lru_cache(maxsize=1024)
def coarse_axis(taps: int, stride: int, padding: int, dilation: int) -> CoarseAxis:
    """How a kernel slides over one axis at half the resolution.

    Args:
        taps: Of the kernel along that axis.
        stride: Of the fine layer; the coarse one has it too.
        padding: In front of the fine image.
        dilation: Of the fine kernel. Even ones are halved, and no taps meet.
    """
    pixels = [[(stride * b + dilation * t - padding) // 2 for t in range(taps)] for b in SIDES]
    step = dilation // 2 if dilation % 2 == 0 else 1
    lows = pixels[0][0], pixels[1][0]
    first, second = (tuple((p - low) // step for p in row) for row, low in zip(pixels, lows, strict=True))
    return CoarseAxis(taps, (first, second), max(*first, *second) + 1, lows, step)


Slides = tuple[tuple[int, int, int, int], ...]
"""Taps, stride, padding and dilation of the fine kernel, by axis."""


def is_traced() -> bool:
    """Whether whoever runs this makes a graph of it, which must hold for every draw."""
    return is_watched() or torch.compiler.is_compiling()


def coarse_axes(slides: Slides) -> tuple[CoarseAxis, ...]:
    """How a kernel slides over the coarse image."""
    return tuple(coarse_axis(*slide) for slide in slides)


def pooled_kernel(weight: Tensor, side: Tensor, slides: Slides) -> Tensor:
    """A kernel for the coarse image: the taps of each coarse pixel added up. Shape `[O, C, *coarse kernel]`.

    Each tap goes to one place, so that the map has orthogonal rows, whose squared lengths are numbers of taps.

    Args:
        weight: Shape `[O, C, *kernel]`.
        side: The side by axis, `[axes]`, integers 0 or 1.
        slides: How the fine kernel slides.
    """
    if has_torch_function((weight, side)):
        return handle_torch_function(pooled_kernel, (weight, side), weight, side, slides)
    if is_traced():
        places = _places_of(side, slides).to(weight)
    else:
        places = _known_places(tuple(side.tolist()), slides, weight.dtype, weight.device)
    sizes = [axis.size for axis in coarse_axes(slides)]
    return thin_product(weight.flatten(2), places).reshape(*weight.shape[:2], *sizes)


def spread_kernel(gradient: Tensor, side: Tensor, slides: Slides) -> Tensor:
    """The transpose of `pooled_kernel`: every tap gets the gradient of the place that it went to.

    Args:
        gradient: Shape `[..., O, C, *coarse kernel]`.
        side: As for `pooled_kernel`.
        slides: As for `pooled_kernel`.
    """
    if is_traced():
        places = _places_of(side, slides).to(gradient)
    else:
        places = _known_places(tuple(side.tolist()), slides, gradient.dtype, gradient.device)
    spread = thin_product(gradient.flatten(-len(slides)), places.t())
    return spread.reshape(*gradient.shape[: -len(slides)], *(slide[0] for slide in slides))


def averaged_kernel(weight: Tensor, side: Tensor, slides: Slides) -> Tensor:
    """As `pooled_kernel`, with the mean of the taps of each coarse pixel in the place of their sum.

    This is another function than the layer's, off by six tenths of its values; for comparison.
    """
    if has_torch_function((weight, side)):
        return handle_torch_function(averaged_kernel, (weight, side), weight, side, slides)
    pooled = pooled_kernel(weight, side, slides)
    for at in range(len(slides)):
        counts = taps_of_each(side, slides, at).clamp(min=1).to(pooled)
        pooled = pooled / counts.reshape(-1, *[1] * (len(slides) - 1 - at))
    return pooled


def mean_of_sides(weight: Tensor, slides: Slides) -> Tensor:
    """The mean over all sides of pooled kernels, laid over each other. Shape `[O, C, *size]`, as `mean_axis` has it.

    On images that are constant on blocks of two by two this is the mean of the layer's output over such blocks.
    """
    if has_torch_function((weight,)):
        return handle_torch_function(mean_of_sides, (weight,), weight, slides)
    sizes = [mean_axis(slide)[1] for slide in slides]
    places = _places_of_mean(slides).to(weight) if is_traced() else _known_mean(slides, weight.dtype, weight.device)
    return thin_product(weight.flatten(2), places).reshape(*weight.shape[:2], *sizes)


def spread_mean(gradient: Tensor, slides: Slides) -> Tensor:
    """The transpose of `mean_of_sides`.

    Args:
        gradient: Shape `[..., O, C, *size]`.
        slides: How the fine kernel slides.
    """
    places = (
        _places_of_mean(slides).to(gradient) if is_traced() else _known_mean(slides, gradient.dtype, gradient.device)
    )
    spread = thin_product(gradient.flatten(-len(slides)), places.t())
    return spread.reshape(*gradient.shape[: -len(slides)], *(slide[0] for slide in slides))


def mean_axis(slide: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Of the mean over both sides: the first coarse pixel that it reads, its taps, and its dilation."""
    axis = coarse_axis(*slide)
    spread = (max(axis.lows) - min(axis.lows)) % axis.dilation
    dilation = axis.dilation if spread == 0 else 1
    first, last = min(axis.lows), max(axis.lows) + (axis.size - 1) * axis.dilation
    return first, (last - first) // dilation + 1, dilation


@lru_cache(maxsize=1024)
def _known_mean(slides: Slides, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _places_of_mean(slides).to(device=device, dtype=dtype)


def _places_of_mean(slides: Slides) -> Tensor:
    found = torch.ones(1, 1, dtype=torch.float64)
    for slide in slides:
        axis, (first, size, dilation) = coarse_axis(*slide), mean_axis(slide)
        each = torch.zeros(axis.taps, size, dtype=torch.float64)
        for b in SIDES:
            for tap, place in enumerate(axis.places[b]):
                each[tap, (axis.lows[b] + place * axis.dilation - first) // dilation] += 0.5
        found = torch.kron(found, each)
    return found


def taps_of_each(side: Tensor, slides: Slides, at: int) -> Tensor:
    """How many taps go to each place of the coarse kernel along one axis, `[coarse size]`, in float64.

    Args:
        side: As for `pooled_kernel`.
        slides: As for `pooled_kernel`.
        at: Which of them.
    """
    if is_traced():
        return _one_axis(side, slides, at).sum(0).to(torch.float64)
    return _known_counts(int(side[at]), slides[at], side.device)


@lru_cache(maxsize=1024)
def _known_counts(side: int, slide: tuple[int, int, int, int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept may be read in a backward
        return _one_axis(torch.tensor([side]), (slide,), 0).sum(0).to(device, torch.float64)


@lru_cache(maxsize=1024)
def _known_places(side: tuple[int, ...], slides: Slides, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _places_of(torch.tensor(side), slides).to(device=device, dtype=dtype)


def _places_of(side: Tensor, slides: Slides) -> Tensor:
    """Tap -> place as a matrix of ones and zeros, `[taps, places]`, both row by row."""
    found = _one_axis(side, slides, 0)
    for at in range(1, len(slides)):
        found = torch.kron(found, _one_axis(side, slides, at))
    return found


def _one_axis(side: Tensor, slides: Slides, at: int) -> Tensor:
    axis = coarse_axis(*slides[at])
    places = torch.tensor(axis.places, device=side.device).index_select(0, side[at : at + 1])[0]
    return (places[:, None] == torch.arange(axis.size, device=side.device)).to(torch.float32)


__all__ = [
    "SIDES",
    "CoarseAxis",
    "Slides",
    "averaged_kernel",
    "coarse_axes",
    "coarse_axis",
    "is_traced",
    "mean_axis",
    "mean_of_sides",
    "pooled_kernel",
    "spread_kernel",
    "spread_mean",
    "taps_of_each",
]
