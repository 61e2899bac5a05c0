"""The backward of pooling and of resizing: along each axis both are products with a matrix of weights, and so are their
transposes.

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
    kernel, steps, before = (list(v) * rank if len(v) == 1 else v for v in (kernel_size, stride or kernel_size, padding))
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


POOLING: Mapping[Any, Callable[..., Any]] = {
    _aten.avg_pool2d_backward.default: partial(average_backward, rank=2),
    _aten.avg_pool3d_backward.default: partial(average_backward, rank=3),
    _aten._adaptive_avg_pool2d_backward.default: partial(adaptive_average_backward, rank=2),
    _aten._adaptive_avg_pool3d_backward.default: partial(adaptive_average_backward, rank=3),
    _aten.adaptive_max_pool2d_backward.default: partial(max_backward, rank=2),
    _aten.adaptive_max_pool3d_backward.default: partial(max_backward, rank=3),
    _aten.max_pool3d_with_indices_backward.default: partial(max_backward, rank=3),
}


__all__ = ["POOLING"]
