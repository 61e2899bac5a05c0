"""Operations of a step that ONNX does not have, by operations that it has.

Promises: each finds what torch's own operation finds, up to rounding, in the memory format that it does. They are what
torch's own decompositions leave out: the backward of convolution, pooling, attention and windows, recurrent layers, and
views of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table, get_decompositions
from torch._prims_common import suggest_memory_format

from perexfx.views.onnx.attention import ATTENTION
from perexfx.views.onnx.pooling import POOLING, one_hot
from perexfx.views.onnx.recurrent import RECURRENT

_aten = torch.ops.aten


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias: all are convolutions, or sums."""
    steps = [list(value) for value in (stride, padding, dilation)]
    of_input = of_weight = of_bias = None
    if output_mask[0]:
        of_input = _of_input(grad_output, input, weight, steps, transposed, groups)
    if output_mask[1]:
        pair = (grad_output, input) if transposed else (input, grad_output)
        of_weight = _of_weight(*pair, weight.shape, steps, groups)
    if output_mask[2]:
        of_bias = grad_output.sum([0, *range(2, grad_output.dim())])
    return of_input, of_weight, of_bias


def _of_input(
    grad_output: Tensor, input: Tensor, weight: Tensor, steps: list[list[int]], transposed: bool, groups: int
) -> Tensor:
    """The convolution that goes the other way."""
    stride, padding, dilation = steps
    rank, size = len(stride), input.shape[2:]
    extra = [0] * rank
    if not transposed:
        span = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        extra = [(i + 2 * p - r) % s for i, p, r, s in zip(size, padding, span, stride, strict=True)]
    found = _aten.convolution.default(
        grad_output, weight, None, stride, padding, dilation, not transposed, extra, groups
    )
    for axis in range(rank):
        found = found.narrow(2 + axis, 0, size[axis])
    return found.contiguous(memory_format=suggest_memory_format(input))


def _of_weight(image: Tensor, window: Tensor, shape: Sequence[int], steps: list[list[int]], groups: int) -> Tensor:
    """The convolution of `image` with `window`, examples in the place of channels; strides and dilations change places.

    Args:
        image: What the kernel moves over. Shape `[n, g i, *size]`.
        window: As many values as the kernel has places. Shape `[n, g o, *out size]`.
        shape: Of the weight, `[g o, i, *kernel]`.
        steps: Stride, padding and dilation.
        groups: Their number.
    """
    stride, padding, dilation = steps
    n, rank = image.shape[0], len(stride)
    each = image.unflatten(1, (groups, -1)).permute(2, 1, 0, *range(3, 3 + rank)).flatten(1, 2)
    kernel = window.transpose(0, 1)
    found = _aten.convolution.default(
        each.contiguous(), kernel.contiguous(), None, dilation, padding, stride, False, [0] * rank, groups
    )
    assert kernel.shape[1] == n
    for axis in range(rank):
        found = found.narrow(2 + axis, 0, shape[2 + axis])
    return found.transpose(0, 1).contiguous()


def trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """The product of three tensors, each repeated along axes of its own, summed over some."""
    product: Tensor | None = None
    for value, axes in ((i1, expand1), (i2, expand2), (i3, expand3)):
        wide = value
        for axis in sorted(axes):
            wide = wide.unsqueeze(axis)
        product = wide if product is None else product * wide
    assert product is not None
    return product.sum(list(sumdim)) if sumdim else product


def weight_norm_backward(
    grad_w: Tensor, saved_v: Tensor, saved_g: Tensor, saved_norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the direction and of the length, for lengths along one axis."""
    others = [axis for axis in range(saved_v.dim()) if axis != dim % saved_v.dim()]
    along = (grad_w * saved_v).sum(others, keepdim=True)
    of_v = (grad_w - saved_v * along / saved_norms.square()) * saved_g / saved_norms
    return of_v, along / saved_norms


def as_strided(input: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None) -> Tensor:
    """A view of memory as a choice of rows along each axis; it needs memory without gaps, and steps along its axes."""
    order = sorted(range(input.dim()), key=lambda axis: (-input.stride(axis), axis))
    dense = input.permute(order)
    if not dense.is_contiguous() or input.storage_offset() or storage_offset:
        return NotImplemented
    axes = [axis for axis in range(dense.dim()) if dense.shape[axis] > 1]
    along: dict[int, list[int]] = {axis: [] for axis in axes}
    for at, (count, step) in enumerate(zip(size, stride, strict=True)):
        if count > 1:
            fitting = [axis for axis in axes if step and step % dense.stride(axis) == 0]
            if not fitting:
                return NotImplemented
            along[fitting[0]].append(at)
    found, made = dense, list[int]()
    for axis in reversed(range(dense.dim())):
        ats = along.get(axis, [])
        steps = [stride[at] // dense.stride(axis) for at in ats]
        counts = [size[at] for at in ats]
        if 1 + sum(s * (c - 1) for s, c in zip(steps, counts, strict=True)) > dense.shape[axis]:
            return NotImplemented
        found = _rows(found, axis, steps, counts)
        made = ats + made
    return found.permute([made.index(at) for at in sorted(made)]).reshape(list(size))


def _rows(value: Tensor, axis: int, steps: Sequence[int], counts: Sequence[int]) -> Tensor:
    """`value` with an axis replaced by several: entry `(a, b, ...)` of them is at `a steps[0] + b steps[1] + ...`."""
    if not counts:
        return value.select(axis, 0)
    if list(steps) == [1]:
        return value.narrow(axis, 0, counts[0])
    places = torch.zeros((), dtype=torch.long, device=value.device)
    for step, count in zip(steps, counts, strict=True):
        places = places.unsqueeze(-1) + torch.arange(count, device=value.device) * step
    return value.index_select(axis, places.flatten()).unflatten(axis, counts)


def unfold_backward(grad_in: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """Of windows along an axis: a product with ones where an entry lies in a window.

    Args:
        grad_in: Windows at `dim`, their entries last.
        input_sizes: Shape of what the windows are of.
        dim: Its axis.
        size: Of a window.
        step: From one to the next.
    """
    axis = dim % len(input_sizes)
    count, places = grad_in.shape[axis], torch.arange(size, device=grad_in.device)
    entries = (torch.arange(count, device=grad_in.device)[:, None] * step + places).flatten()
    found = grad_in.movedim(axis, -2).flatten(-2) @ one_hot(entries, input_sizes[axis], grad_in.dtype)
    return found.movedim(-1, axis).contiguous()


def diagonal_backward(grad_output: Tensor, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    """Of a diagonal, which lies last: zeros beside it."""
    axes = dim1 % len(input_sizes), dim2 % len(input_sizes)
    along = torch.arange(grad_output.shape[-1], device=grad_output.device)
    rows = one_hot(along - min(offset, 0), input_sizes[axes[0]], grad_output.dtype)
    columns = one_hot(along + max(offset, 0), input_sizes[axes[1]], grad_output.dtype)
    found = rows.transpose(0, 1) @ (grad_output.unsqueeze(-1) * columns)
    return found.movedim((-2, -1), axes).contiguous()


def shrink_backward(grad_out: Tensor, input: Tensor, lambd: float) -> Tensor:
    """Of hard and soft shrinkage: nothing where the input is small."""
    return torch.where(input.abs() <= lambd, 0.0, grad_out)


def log_sigmoid(input: Tensor) -> Tensor:
    """Without a sigmoid, which is rounded to one, or to zero: so torch's exporter has it."""
    return -F.softplus(-input)


def log_sigmoid_forward(input: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and what its backward does not read."""
    return log_sigmoid(input), input.new_empty(0)


def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64 step by step: torch's exporter takes its mean and deviation for float32."""
    if input.dtype is not torch.float64:
        return NotImplemented
    return decomposition_table[_aten.native_layer_norm.default](input, normalized_shape, weight, bias, eps)


def _torchs_own() -> dict[Any, Callable[..., Any]]:
    """The decompositions of torch that its exporter to ONNX goes without, or has something wrong for.

    Its losses have no total weight, which their backward divides by.
    """
    known = [op for op in decomposition_table if str(op).endswith("_backward.default")]
    others = (_aten.nll_loss_forward, _aten.nll_loss2d_forward, _aten.binary_cross_entropy_with_logits)
    return get_decompositions([*known, *(op.default for op in others)])


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    **_torchs_own(),
    **ATTENTION,
    **POOLING,
    **RECURRENT,
    _aten._trilinear.default: trilinear,
    _aten._weight_norm_interface_backward.default: weight_norm_backward,
    _aten.as_strided.default: as_strided,
    _aten.convolution_backward.default: convolution_backward,
    _aten.diagonal_backward.default: diagonal_backward,
    _aten.log_sigmoid_forward.default: log_sigmoid_forward,
    _aten.hardshrink_backward.default: shrink_backward,
    _aten.native_layer_norm.default: layer_norm,
    _aten.softshrink_backward.default: shrink_backward,
    _aten.unfold_backward.default: unfold_backward,
}


__all__ = ["DECOMPOSITIONS", "log_sigmoid"]
