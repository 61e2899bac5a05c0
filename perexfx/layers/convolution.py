"""`conv1d`, `conv2d`, `conv3d`: any stride, padding, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature, is_copied_for
from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Target
from perexfx.kernels.geometry import ConvolutionGeometry, per_axis


@dataclass(frozen=True)
class _Padding:
    """Padding as (symmetric part, what the end of each axis gets on top of it)."""

    symmetric: tuple[int, ...]
    extra_at_end: tuple[int, ...]

    @classmethod
    def of(cls, padding: int | str | Sequence[int], dilation: Sequence[int], kernel: Sequence[int]) -> _Padding:
        """From numbers, "valid" or "same" (which pads one more at the end where it cannot pad evenly)."""
        rank = len(kernel)
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            return cls(tuple(total // 2 for total in totals), tuple(total % 2 for total in totals))
        return cls(per_axis(padding, rank), (0,) * rank)

    def extend(self, layer_input: Tensor) -> Tensor:
        """The input with its extra positions."""
        if not any(self.extra_at_end):
            return layer_input
        return F.pad(layer_input, [amount for extra in reversed(self.extra_at_end) for amount in (0, extra)])

    def crop(self, grad_input: Tensor) -> Tensor:
        """The gradient of `extend`."""
        for axis, extra in enumerate(self.extra_at_end, start=2):
            grad_input = grad_input.narrow(axis, 0, grad_input.shape[axis] - extra)
        return grad_input


def computed_in_graph(arguments: Arguments, names: Sequence[str]) -> str | None:
    """Which of these arguments are no constants, as a reason to refuse; None if they all are."""
    computed = [name for name in names if isinstance(arguments[name], torch.fx.Node)]
    return f"its {' and '.join(computed)} must be constant" if computed else None


@dataclass(frozen=True)
class ConvolutionRule(Rule):
    """A convolution: `n g p t, n g o t -> n (g o) p` over unfolded inputs, which its strategies avoid to form.

    Attributes:
        rank: Number of spatial axes.
        kind: conv1d, conv2d or conv3d.
        targets: The function of this rank, alone.
        function: The same.
    """

    rank: int
    kind: str
    targets: Sequence[Target]
    function: Callable[..., Tensor]
    operands = ("weight", "bias")
    inputs = ("input",)

    @staticmethod
    def named(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.conv2d`."""
        return dict(locals())

    def refuses(self, arguments: Arguments) -> str | None:
        """Strides and the like that are computed in the graph."""
        return computed_in_graph(arguments, ("stride", "padding", "dilation", "groups"))

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Inputs without a batch axis."""
        if len(geometry.shapes["input"]) != self.rank + 2 or geometry.layouts["input"].axis != 0:
            return f"its input must be [examples, channels, {self.rank} spatial axes]"
        return None

    def _slide(self, arguments: Arguments, kernel: Sequence[int]) -> tuple[ConvolutionGeometry, _Padding]:
        given = (arguments[name] for name in ("stride", "padding", "dilation"))
        how = (tuple(value) if isinstance(value, list) else value for value in given)
        return _slide_of(*how, arguments["groups"], tuple(kernel))

    def weighed_axes(self, operand: str) -> Collection[int]:
        """Channels and taps."""
        return range(2 + self.rank)

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """A convolution for the weight; the bias' gradients at hand."""
        shape = geometry.shapes["weight"]
        slide, padding = self._slide(arguments, shape[2:])
        size = geometry.shapes["input"][2:]
        in_size = tuple(s + extra for s, extra in zip(size, padding.extra_at_end, strict=True))
        frames, out_size = geometry.layouts["input"].repeats, geometry.output_shape[2:]
        return {
            "weight": ConvolutionSignature(geometry.n, frames, in_size, out_size, shape, slide),
            "bias": GradientSignature(geometry.n, (shape[0],)),
        }

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer."""
        layer_input, weight, bias = (arguments[name] for name in ("input", "weight", "bias"))
        slide, padding = self._slide(arguments, weight.shape[2:])
        layer_input = padding.extend(layer_input)
        how = slide.stride, slide.padding, slide.dilation, slide.groups
        if not is_copied_for(weight, layer_input, math.prod(geometry.output_shape)):
            return self.function(layer_input, weight, bias, *how), ()
        output = self.function(layer_input.contiguous(), weight, bias, *how)
        return output.contiguous(memory_format=torch.channels_last), ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Torch's own kernel for the input's gradient."""
        weight = call.arguments["weight"]
        slide, padding = self._slide(call.arguments, weight.shape[2:])
        layer_input = padding.extend(call.arguments["input"])
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            gradients["input"] = padding.crop(_input_gradient(call.grad_output, layer_input, weight, slide))
        factors: dict[str, Factors] = {}
        layout = call.geometry.layouts["input"]
        right = call.grad_output_examples_first
        if "weight" in call.operands:
            left = layout.examples_first(layer_input)
            factors["weight"] = Convolution(left, right, tuple(weight.shape), slide)
        if "bias" in call.operands:
            factors["bias"] = Gradient(right.sum((1, *range(3, right.dim()))))
        return gradients, factors


@lru_cache(maxsize=1024)
def _slide_of(
    stride: int | tuple[int, ...],
    padding: int | str | tuple[int, ...],
    dilation: int | tuple[int, ...],
    groups: int,
    kernel: tuple[int, ...],
) -> tuple[ConvolutionGeometry, _Padding]:
    rank = len(kernel)
    per = per_axis(dilation, rank)
    padded = _Padding.of(padding, per, kernel)
    return ConvolutionGeometry(per_axis(stride, rank), padded.symmetric, per, groups), padded


def _input_gradient(grad_output: Tensor, layer_input: Tensor, weight: Tensor, slide: ConvolutionGeometry) -> Tensor:
    if is_copied_for(weight, layer_input, grad_output.numel()):
        found = _input_gradient(grad_output.contiguous(), layer_input.contiguous(), weight, slide)
        return found.contiguous(memory_format=torch.channels_last)
    if set(weight.shape[2:]) == {1} and max(slide.stride) > 1 and not any(slide.padding) and slide.groups == 1:
        return _of_strided_pixels(grad_output, layer_input, weight, slide.stride)
    return torch.ops.aten.convolution_backward(
        grad_output,
        layer_input,
        weight,
        None,
        slide.stride,
        slide.padding,
        slide.dilation,
        False,
        [0] * len(slide.stride),
        slide.groups,
        [True, False, False],
    )[0]


def _of_strided_pixels(grad_output: Tensor, layer_input: Tensor, weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Where a kernel is one pixel and some are skipped, theirs is zero: several times faster than torch's own way."""
    rank = len(stride)
    gradient = torch.zeros_like(layer_input)
    read = gradient[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]
    ones, zeros = [1] * rank, [0] * rank
    read.copy_(torch.convolution(grad_output, weight.transpose(0, 1), None, ones, zeros, ones, False, zeros, 1))
    return gradient


CONVOLUTIONS = (
    ConvolutionRule(1, "conv1d", (torch.conv1d,), torch.conv1d),
    ConvolutionRule(2, "conv2d", (torch.conv2d,), torch.conv2d),
    ConvolutionRule(3, "conv3d", (torch.conv3d,), torch.conv3d),
)
