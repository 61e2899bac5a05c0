"""The border of a region at run time: conversions between memory formats.

Promises: where the plan leaves a region as it is, a conversion returns what it is given; where it does not, images lie
with their channels last inside and in torch's default format outside, in the forward and in the backward. A region
whose images arrive in another format is left alone for that forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from perexfx.runtime.tape import Tape


def enter(tape: Tape, image: Any, region: int) -> Any:
    """A value that a region takes for an image."""
    if tape.plan is None or region not in tape.plan.channels_last or region in tape.left_alone:
        return image
    if not isinstance(image, Tensor) or image.dim() != 4:
        return image
    if not image.is_contiguous():
        tape.left_alone.add(region)
        return image
    return _Reformat.apply(image, torch.channels_last, torch.contiguous_format)


def leave(tape: Tape, image: Tensor, region: int) -> Tensor:
    """A value of a region that is read outside of it."""
    if tape.plan is None or region not in tape.plan.channels_last or region in tape.left_alone:
        return image
    return image if image.is_contiguous() else _Reformat.apply(image, torch.contiguous_format, torch.channels_last)


class _Reformat(Function):
    """The same numbers elsewhere in memory; their gradient comes back in the other format."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, inside: torch.memory_format, outside: torch.memory_format) -> Tensor:
        ctx.outside = outside
        return in_format(image, inside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        return in_format(grad_outputs[0], ctx.outside), None, None


def in_format(image: Tensor, wanted: torch.memory_format) -> Tensor:
    """`image` `[n, C, H, W]` in a memory format; in its strides too, where one channel or one position fits both."""
    image = image.contiguous(memory_format=wanted)
    _, channels, height, width = image.shape
    if wanted is torch.channels_last and (channels == 1 or height * width == 1):
        return image.as_strided(image.shape, (channels * height * width, 1, width * channels, channels))
    return image


__all__ = ["enter", "in_format", "leave"]
