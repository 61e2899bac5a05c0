"""The backward of pooling, resizing and padding: along each axis a product with a matrix of weights, whose transpose
gives the gradient.

Promises: each finds what torch's own operation finds, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def _scattered(grad_output: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """`grad_output` `[..., *out size]` multiplied along its last axes with `[out, in]` each: `[..., *in size]`."""
    found = grad_output
    rank = len(matrices)
    for matrix in matrices:
        found = (found.movedim(-rank, -1) @ matrix).contiguous()
    return found


def _windows(grad_output: Tensor, starts: Tensor, ends: Tensor, size: int) -> Tensor:
    """Ones from each start to before each end: `[out, in]`."""
    places = torch.arange(size, device=grad_output.device)
    return ((places >= starts[:, None]) & (places < ends[:, None])).to(grad_output.dtype)


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
    kernel, steps, before = (
        list(v) * rank if len(v) == 1 else v for v in (kernel_size, stride or kernel_size, padding)
    )
    matrices = []
    for axis in range(rank):
        count, size = grad_output.shape[axis - rank], input.shape[axis - rank]
        starts = torch.arange(count, device=input.device) * steps[axis] - before[axis]
        ends = (starts + kernel[axis]).clamp(max=size + before[axis])
        inner = starts.clamp(min=0), ends.clamp(max=size)
        counted = ends - starts if count_include_pad else inner[1] - inner[0]
        matrix = _windows(grad_output, *inner, size)
        matrices.append(matrix if divisor_override else matrix / counted[:, None])
    found = _scattered(grad_output, matrices)
    return found / divisor_override if divisor_override else found


def adaptive_average_backward(grad_output: Tensor, input: Tensor, *, rank: int) -> Tensor:
    """Of adaptive average pooling."""
    matrices = []
    for axis in range(rank):
        count, size = grad_output.shape[axis - rank], input.shape[axis - rank]
        places = torch.arange(count, device=input.device)
        starts = torch.div(places * size, count, rounding_mode="floor")
        ends = torch.div((places + 1) * size + count - 1, count, rounding_mode="floor")
        matrices.append(_windows(grad_output, starts, ends, size) / (ends - starts)[:, None])
    return _scattered(grad_output, matrices)


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
        matrices.append(_at(grad_output, places.clamp(0, size - 1), size))
    return _scattered(grad_output, matrices)


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
        step = _step(count, size, scales[axis] if scales else None)
        places = ((torch.arange(count, device=grad_output.device) + shift) * step).floor()
        matrices.append(_at(grad_output, places.clamp(0, size - 1), size))
    return _scattered(grad_output, matrices)


def linear_backward(
    grad_output: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    *scales: float | None,
) -> Tensor:
    """Of resizing by linear interpolation."""
    rank = len(output_size)
    matrices = []
    for axis in range(rank):
        count, size = output_size[axis], input_size[2 + axis]
        places = torch.arange(count, device=grad_output.device, dtype=grad_output.dtype)
        if align_corners:
            at = places * ((size - 1) / (count - 1) if count > 1 else 0.0)
        else:
            at = ((places + 0.5) * _step(count, size, scales[axis] if scales else None) - 0.5).clamp(min=0)
        first = at.floor().clamp(max=size - 1)
        share = (at - first).clamp(0, 1)[:, None]
        second = (first + 1).clamp(max=size - 1)
        matrices.append(_at(grad_output, first, size) * (1 - share) + _at(grad_output, second, size) * share)
    return _scattered(grad_output, matrices)


def _step(count: int, size: int, scale: float | None) -> float:
    """From one entry of the result to the next, in entries of the input."""
    return 1 / scale if scale else size / count


def _at(like: Tensor, places: Tensor, size: int) -> Tensor:
    """A one at the place of each row: `[out, in]`."""
    return (torch.arange(size, device=like.device) == places[:, None]).to(like.dtype)


POOLING: Mapping[Any, Callable[..., Any]] = {
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
    _aten.upsample_linear1d_backward.default: linear_backward,
    _aten.upsample_bilinear2d_backward.default: linear_backward,
    _aten.upsample_trilinear3d_backward.default: linear_backward,
}


__all__ = ["POOLING"]
