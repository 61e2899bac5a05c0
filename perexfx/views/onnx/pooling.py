"""The backward of pooling, resizing and padding: along each axis a product with the matrix of weights that its forward
multiplies with, transposed; and the forwards that torch's exporter has wrong.

Promises: each finds what torch's own operation finds, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _multiplied(value: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """`value` multiplied along each of its last axes with a matrix `[before, after]`."""
    found = value
    rank = len(matrices)
    for matrix in matrices:
        found = (found.movedim(-rank, -1) @ matrix).contiguous()
    return found


def average(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    rank: int,
) -> Tensor:
    """Average pooling with a divisor of its own, which torch's exporter forgets."""
    if not divisor_override:
        return NotImplemented
    kernel, steps, before = (_each(v, rank) for v in (kernel_size, stride or kernel_size, padding))
    matrices = []
    for axis in range(rank):
        size = input.shape[axis - rank]
        span = size + 2 * before[axis] - kernel[axis]
        count = (-(-span // steps[axis]) if ceil_mode else span // steps[axis]) + 1
        if ceil_mode and (count - 1) * steps[axis] >= size + before[axis]:  # the last window would lie outside
            count -= 1
        starts = torch.arange(count, device=input.device) * steps[axis] - before[axis]
        matrices.append(_windows(input, starts, starts + kernel[axis], size).transpose(0, 1))
    return _multiplied(input, matrices) / divisor_override


def average_backward(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    *,
    rank: int,
) -> Tensor:
    """Of average pooling."""
    kernel, steps, before = (_each(v, rank) for v in (kernel_size, stride or kernel_size, padding))
    matrices = []
    for axis in range(rank):
        count, size = grad_output.shape[axis - rank], input.shape[axis - rank]
        starts = torch.arange(count, device=input.device) * steps[axis] - before[axis]
        ends = (starts + kernel[axis]).clamp(max=size + before[axis])
        inner = starts.clamp(min=0), ends.clamp(max=size)
        counted = ends - starts if count_include_pad else inner[1] - inner[0]
        matrix = _windows(grad_output, *inner, size)
        matrices.append(matrix if divisor_override else matrix / counted[:, None])
    found = _multiplied(grad_output, matrices)
    return found / divisor_override if divisor_override else found


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    """One number for every axis."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * rank if len(numbers) == 1 else numbers


def _windows(like: Tensor, starts: Tensor, ends: Tensor, size: int) -> Tensor:
    """Ones from each start to before each end: `[windows, size]`."""
    places = torch.arange(size, device=like.device)
    return ((places >= starts[:, None]) & (places < ends[:, None])).to(like.dtype)


def adaptive_average_backward(grad_output: Tensor, input: Tensor, *, rank: int) -> Tensor:
    """Of adaptive average pooling."""
    matrices = []
    for axis in range(rank):
        count, size = grad_output.shape[axis - rank], input.shape[axis - rank]
        places = torch.arange(count, device=input.device)
        starts = torch.div(places * size, count, rounding_mode="floor")
        ends = torch.div((places + 1) * size + count - 1, count, rounding_mode="floor")
        matrices.append(_windows(grad_output, starts, ends, size) / (ends - starts)[:, None])
    return _multiplied(grad_output, matrices)


def max_backward(grad_output: Tensor, input: Tensor, *rest: Any, rank: int) -> Tensor:
    """Of max pooling, from the places of the largest entries, which are the last of the other arguments."""
    indices: Tensor = rest[-1]
    lead = input.shape[: input.dim() - rank]
    zeros = grad_output.new_zeros(*lead, input.shape[-rank:].numel())
    found = zeros.scatter_add(-1, indices.flatten(-rank), grad_output.flatten(-rank))
    return found.reshape(input.shape)


def replicated_backward(grad_output: Tensor, input: Tensor, padding: Sequence[int], *, rank: int) -> Tensor:
    """Of padding with the entries at the border."""
    matrices = []
    for axis in range(rank):
        count, size = grad_output.shape[axis - rank], input.shape[axis - rank]
        places = torch.arange(count, device=input.device) - padding[2 * (rank - 1 - axis)]
        matrices.append(one_hot(places.clamp(0, size - 1), size, grad_output.dtype))
    return _multiplied(grad_output, matrices)


def nearest_backward(
    grad_output: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    *scales: float | None,
    shift: float = 0.0,
) -> Tensor:
    """Of resizing to the nearest entry; `shift` is 1/2 where distances are taken from the middle of entries."""
    rank = len(output_size)
    matrices = []
    for axis in range(rank):
        count, size = output_size[axis], input_size[2 + axis]
        is_given = not shift and count in (size, 2 * size)  # torch forgets the scale for these
        step = _step(count, size, scales[axis] if scales and not is_given else None)
        places = ((torch.arange(count, device=grad_output.device) + shift) * step).floor()
        matrices.append(one_hot(places.clamp(0, size - 1), size, grad_output.dtype))
    return _multiplied(grad_output, matrices)


def resized_backward(
    grad_output: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    *scales: float | None,
    shares: Shares,
) -> Tensor:
    """Of resizing by interpolation."""
    return _multiplied(grad_output, _of_each(shares, grad_output, output_size, input_size[2:], align_corners, scales))


def cubic_backward(grad_output: Tensor, output_size: Sequence[int], input_size: Sequence[int], *rest: Any) -> Tensor:
    """Of resizing by cubic convolution; where no size changes it is a copy in torch, whatever the scale."""
    if list(output_size) == list(input_size[2:]):
        return grad_output.clone()
    return resized_backward(grad_output, output_size, input_size, *rest, shares=_cubic)


def linear(input: Tensor, output_size: Sequence[int], align_corners: bool, *scales: float | None) -> Tensor:
    """Resizing by linear interpolation with a scale of its own, which torch's exporter forgets."""
    return _interpolated(_linear, input, output_size, align_corners, scales) if any(scales) else NotImplemented


def resized(
    input: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
    *,
    shares: Shares,
) -> Tensor:
    """Resizing to a size or by scales."""
    if output_size is None:
        assert scale_factors is not None
        output_size = [math.floor(s * f) for s, f in zip(input.shape[2:], scale_factors, strict=True)]
    return _interpolated(shares, input, output_size, align_corners, scale_factors)


def _interpolated(
    shares: Shares,
    input: Tensor,
    output_size: Sequence[int],
    align_corners: bool,
    scales: Sequence[float | None] | None,
) -> Tensor:
    matrices = _of_each(shares, input, output_size, input.shape[2:], align_corners, scales)
    return _multiplied(input, [matrix.transpose(0, 1) for matrix in matrices])


Shares = Callable[[Tensor, int, int, bool, float | None], Tensor]
"""`(like, count, size, align_corners, scale)` to how much each entry of the input has of each of the result along one
axis: `[count, size]`."""


def _of_each(
    shares: Shares,
    like: Tensor,
    counts: Sequence[int],
    sizes: Sequence[int],
    align_corners: bool,
    scales: Sequence[float | None] | None,
) -> list[Tensor]:
    """The matrix of each axis."""
    return [
        shares(like, count, size, align_corners, scales[axis] if scales else None)
        for axis, (count, size) in enumerate(zip(counts, sizes, strict=True))
    ]


def _linear(like: Tensor, count: int, size: int, align_corners: bool, scale: float | None) -> Tensor:
    """By linear interpolation."""
    at = torch.arange(count, device=like.device).to(like.dtype)
    if count != size:  # torch leaves axes of the same size as they are, whatever the scale
        at = _positions(like, count, size, align_corners, scale).clamp(min=0)
    first = at.floor().clamp(max=size - 1)
    share = (at - first).clamp(0, 1)[:, None]
    ends = [one_hot(place, size, like.dtype) for place in (first, (first + 1).clamp(max=size - 1))]
    return ends[0] * (1 - share) + ends[1] * share


def _cubic(like: Tensor, count: int, size: int, align_corners: bool, scale: float | None) -> Tensor:
    """By cubic convolution (Keys 1981, equation 4), with the parameter that torch has."""
    a = -0.75
    at = _positions(like, count, size, align_corners, scale)
    first = at.floor()
    share = (at - first)[:, None]
    matrix = torch.zeros(count, size, dtype=like.dtype, device=like.device)
    for step in (-1, 0, 1, 2):
        x = (share - step).abs()
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        place = (first + step).clamp(0, size - 1)
        matrix = matrix + one_hot(place, size, like.dtype) * (near if step in (0, 1) else far)
    return matrix


def _positions(like: Tensor, count: int, size: int, align_corners: bool, scale: float | None) -> Tensor:
    """Where in the input, of `size` entries, each of `count` results of a resizing lies."""
    places = torch.arange(count, device=like.device, dtype=like.dtype)
    if align_corners:
        return places * ((size - 1) / (count - 1) if count > 1 else 0.0)
    return (places + 0.5) * _step(count, size, scale) - 0.5


def _step(count: int, size: int, scale: float | None) -> float:
    """From one entry of the result to the next, in entries of the input."""
    return 1 / scale if scale else size / count


def one_hot(places: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """A one at the place of each row: `[places, size]`."""
    return (torch.arange(size, device=places.device) == places[:, None]).to(dtype)


POOLING: Mapping[Any, Callable[..., Any]] = {
    _aten.avg_pool2d.default: partial(average, rank=2),
    _aten.avg_pool3d.default: partial(average, rank=3),
    _aten.avg_pool2d_backward.default: partial(average_backward, rank=2),
    _aten.avg_pool3d_backward.default: partial(average_backward, rank=3),
    _aten._adaptive_avg_pool2d_backward.default: partial(adaptive_average_backward, rank=2),
    _aten._adaptive_avg_pool3d_backward.default: partial(adaptive_average_backward, rank=3),
    _aten.adaptive_max_pool2d_backward.default: partial(max_backward, rank=2),
    _aten.adaptive_max_pool3d_backward.default: partial(max_backward, rank=3),
    _aten.max_pool3d_with_indices_backward.default: partial(max_backward, rank=3),
    _aten.replication_pad1d_backward.default: partial(replicated_backward, rank=1),
    _aten.replication_pad2d_backward.default: partial(replicated_backward, rank=2),
    _aten.replication_pad3d_backward.default: partial(replicated_backward, rank=3),
    _aten.upsample_nearest1d_backward.default: nearest_backward,
    _aten.upsample_nearest2d_backward.default: nearest_backward,
    _aten.upsample_nearest3d_backward.default: nearest_backward,
    _aten._upsample_nearest_exact1d_backward.default: partial(nearest_backward, shift=0.5),
    _aten._upsample_nearest_exact2d_backward.default: partial(nearest_backward, shift=0.5),
    _aten._upsample_nearest_exact3d_backward.default: partial(nearest_backward, shift=0.5),
    _aten.upsample_linear1d.default: linear,
    _aten.upsample_bilinear2d.default: linear,
    _aten.upsample_trilinear3d.default: linear,
    _aten.upsample_linear1d_backward.default: partial(resized_backward, shares=_linear),
    _aten.upsample_bilinear2d_backward.default: partial(resized_backward, shares=_linear),
    _aten.upsample_trilinear3d_backward.default: partial(resized_backward, shares=_linear),
    _aten.upsample_bicubic2d_backward.default: cubic_backward,
}


BY_SCALE: Mapping[Any, Callable[..., Any]] = {
    _aten.upsample_linear1d.vec: partial(resized, shares=_linear),
    _aten.upsample_bilinear2d.vec: partial(resized, shares=_linear),
    _aten.upsample_trilinear3d.vec: partial(resized, shares=_linear),
    _aten.upsample_bicubic2d.vec: partial(resized, shares=_cubic),
}
"""Resizing as forwards call it, whose scale torch's exporter rounds or forgets."""


__all__ = ["BY_SCALE", "POOLING", "average", "one_hot"]
