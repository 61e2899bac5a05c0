"""`group_norm` and `instance_norm`: normalised over an example's own channels and positions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx import kernels
from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, sum_positions


class _ChannelNorm(Rule):
    """`y = w * (x - mean) / std + b` per group of channels: `n t c (normalised input), n t c -> n c`.

    Every example's gradient comes from ONE call of torch's own backward, over a batch viewed as one image of n times
    the channels and groups: at the cost of the ordinary backward.
    """

    operands = ("weight", "bias")
    inputs = ("input",)

    @abstractmethod
    def _groups(self, arguments: Arguments) -> int:
        """Into how many groups the channels are split."""

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Inputs without a batch axis."""
        if geometry.layouts["input"].axis != 0:
            return "its input must be [examples, channels, ...]"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        channels = geometry.shapes["input"][1]
        return {name: GradientSignature(geometry.n, (channels,)) for name in self.operands}

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer; mean and inverse deviation are kept."""
        x, eps = arguments["input"], arguments["eps"]
        weight, bias = (value if value is None else value.contiguous() for value in map(arguments.get, self.operands))
        rows, channels, *size = x.shape
        if _has_channels_last(x) and (found := kernels.group_norm(x, weight, bias, self._groups(arguments), eps)):
            output, mean, rstd = found
            return output, (mean, rstd)
        output, mean, rstd = torch.native_group_norm(  # takes every argument to be contiguous, without a look
            x if _has_channels_last(x) else _by_channel(x),
            weight,
            bias,
            rows,
            channels,
            math.prod(size),
            self._groups(arguments),
            eps,
        )
        return output.view(x.shape), (mean, rstd)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """One kernel for the input's gradient and every example's weight and bias gradients."""
        x, weight = call.arguments["input"], call.arguments["weight"]
        mean, rstd = call.residuals
        rows, channels, *size = x.shape
        if rows == 0:
            empty = Gradient(x.new_zeros(0, channels))
            return {name: torch.zeros_like(x) for name in call.inputs}, dict.fromkeys(call.operands, empty)
        if _has_channels_last(x):
            grad_input, found = _channels_last_backward(call.grad_output, x, weight, mean, rstd)
            return dict.fromkeys(call.inputs, grad_input), _factors(call, found)
        scale = None if weight is None else weight.repeat(rows)
        if scale is None and call.operands:  # the kernel asks for a weight wherever it gives a bias gradient
            scale = x.new_ones(rows * channels)
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            _by_channel(call.grad_output),
            _by_channel(x),
            mean.reshape(1, -1),
            rstd.reshape(1, -1),
            scale,
            1,
            rows * channels,
            math.prod(size),
            rows * self._groups(call.arguments),
            [bool(call.inputs), "weight" in call.operands, "bias" in call.operands],
        )
        found = {"weight": grad_weight, "bias": grad_bias}
        per_row = {name: found[name].view(rows, channels) for name in call.operands}
        return {name: grad_input.view(x.shape) for name in call.inputs}, _factors(call, per_row)


def _factors(call: Backward, per_row: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Each example's gradients from those of each row, `[rows, channels]`."""
    layout = call.geometry.layouts["input"]
    if layout.repeats == 1:  # a row is an example
        return {name: Gradient(per_row[name]) for name in call.operands}
    return {name: Gradient(sum_positions(layout.examples_first(per_row[name]))) for name in call.operands}


def _by_channel(x: Tensor) -> Tensor:
    """`[rows, channels, positions]`: the kernels read the strides of images of one channel as channels last."""
    rows, channels, *size = x.shape
    return x.contiguous().view(rows, channels, math.prod(size))


def _has_channels_last(x: Tensor) -> bool:
    """By its strides too: torch's kernel refuses others, though those of axes of one element say nothing."""
    if x.dim() != 4 or x.is_contiguous() or x.dtype not in (torch.float32, torch.float64):
        return False
    _, channels, height, width = x.shape
    return x.stride() == (channels * height * width, 1, width * channels, channels)


CHUNK_ELEMENTS = 1 << 19
"""As many examples at a time as fit this many elements, so that what was just written is read from the cache."""


def _channels_last_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of the input, and each row's of weight and bias, with two passes over positions.

    With sums over positions `b = sum g` and `s = sum g x`, the weight's gradient is `(s - mean b) rstd`, and the
    input's is `g w rstd + p x + q` with p and q from sums over the channels of each group.

    Args:
        grad_output: Shape `[rows, C, H, W]`.
        x: The same, channels last.
        weight: Shape `[C]`, or None.
        mean: Shape `[rows, groups]`.
        rstd: The same.
    """
    rows, channels, height, width = x.shape
    positions, groups = height * width, mean.shape[1]
    in_group = channels // groups
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    scale = weight if weight is None else weight.contiguous()
    if (by_kernel := kernels.group_norm_back(grad_output, x, scale, mean, rstd)) is not None:
        return by_kernel[0], {"weight": by_kernel[1], "bias": by_kernel[2]}
    grad_input = torch.empty_like(x)
    pixels, grads, into = (v.permute(0, 2, 3, 1).view(rows, positions, channels) for v in (x, grad_output, grad_input))
    step = max(1, CHUNK_ELEMENTS // (positions * channels))
    ones = x.new_ones(1, 1, positions).expand(rows, 1, positions)
    sums = x.new_empty(2, rows, 1, channels)  # of g and of g x
    for row, value, g, out, of_g, of_gx in zip(
        *(v.split(step) for v in (ones, pixels, grads, into, *sums)), strict=True
    ):
        torch.bmm(row, g, out=of_g)
        torch.bmm(row, torch.mul(g, value, out=out), out=of_gx)

    def by_group(value: Tensor) -> Tensor:
        return value.view(rows, groups, in_group)

    by_bias, by_value = by_group(sums[0]), by_group(sums[1])
    m, r = mean.unsqueeze(2), rstd.unsqueeze(2)
    found = {"bias": sums[0].view(rows, channels), "weight": torch.addcmul(by_value, m, by_bias, value=-1).mul_(r)}
    found["weight"] = found["weight"].view(rows, channels)
    w = x.new_ones(()) if weight is None else weight.view(groups, in_group)
    b, s = (by_bias * w).sum(2, keepdim=True), (by_value * w).sum(2, keepdim=True)
    p = (b * m - s) * r * r * r / (positions * in_group)
    q = (p * m).add_(b * r, alpha=1 / (positions * in_group)).neg_()
    slope, p, q = (v.expand(rows, groups, in_group).reshape(rows, 1, channels) for v in (r * w, p, q))
    for value, g, out, *by in zip(*(v.split(step) for v in (pixels, grads, into, slope, p, q)), strict=True):
        torch.addcmul(by[2], value, by[1], out=out).addcmul_(g, by[0])
    return grad_input, found


@dataclass(frozen=True)
class GroupNorm(_ChannelNorm):
    """`num_groups` groups of channels."""

    kind = "group_norm"
    targets = (F.group_norm, torch.group_norm)

    @staticmethod
    def named(
        input: Any,
        num_groups: Any,
        weight: Any = None,
        bias: Any = None,
        eps: Any = 1e-5,
        cudnn_enabled: Any = True,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.group_norm`."""
        return dict(locals())

    def _groups(self, arguments: Arguments) -> int:
        return arguments["num_groups"]


@dataclass(frozen=True)
class InstanceNorm(_ChannelNorm):
    """One group per channel."""

    kind = "instance_norm"
    targets = (F.instance_norm,)

    @staticmethod
    def named(
        input: Any,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        use_input_stats: Any = True,
        momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.instance_norm`."""
        return dict(locals())

    def refuses(self, arguments: Arguments) -> str | None:
        """Running statistics, which average over the batch."""
        if arguments["running_mean"] is not None or not arguments["use_input_stats"]:
            return "its running statistics average over the examples of a batch; set track_running_stats=False"
        return None

    def _groups(self, arguments: Arguments) -> int:
        return arguments["input"].shape[1]
