"""`conv_transpose1d`, `conv_transpose2d`, `conv_transpose3d`: a convolution with input and output exchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Target, sum_positions
from perexfx.kernels.geometry import ConvolutionGeometry, per_axis
from perexfx.layers.convolution import computed_in_graph


@dataclass(frozen=True)
class TransposedConvolution(Rule):
    """The kernel's gradient is that of the convolution from output to input, so every strategy for those applies.

    Attributes:
        rank: Number of spatial axes.
        kind: conv_transpose1d, conv_transpose2d or conv_transpose3d.
        targets: The function of this rank, alone.
        function: The same.
        adjoint: The convolution of this rank.
    """

    rank: int
    kind: str
    targets: Sequence[Target]
    function: Callable[..., Tensor]
    adjoint: Callable[..., Tensor]
    operands = ("weight", "bias")
    inputs = ("input",)

    @staticmethod
    def named(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.conv_transpose2d`."""
        return dict(locals())

    def refuses(self, arguments: Arguments) -> str | None:
        """Strides and the like that are computed in the graph."""
        return computed_in_graph(arguments, ("stride", "padding", "output_padding", "dilation", "groups"))

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Inputs without a batch axis."""
        if len(geometry.shapes["input"]) != self.rank + 2 or geometry.layouts["input"].axis != 0:
            return f"its input must be [examples, channels, {self.rank} spatial axes]"
        return None

    def _slide(self, arguments: Arguments) -> ConvolutionGeometry:
        stride, padding, dilation = (per_axis(arguments[name], self.rank) for name in ("stride", "padding", "dilation"))
        return ConvolutionGeometry(stride, padding, dilation, arguments["groups"])

    def _adjoint_size(self, arguments: Arguments, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Size of the convolution from output to input: more than the input's where `output_padding` is large."""
        slide = self._slide(arguments)
        steps = zip(size, kernel, slide.stride, slide.padding, slide.dilation, strict=True)
        return tuple((s + 2 * p - d * (k - 1) - 1) // stride + 1 for s, k, stride, p, d in steps)

    def weighed_axes(self, operand: str) -> Collection[int]:
        """Channels and taps; its kernel lies as that of the convolution from output to input."""
        return range(2 + self.rank)

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """A convolution for the weight; the bias' gradients at hand."""
        shape = geometry.shapes["weight"]
        slide, frames = self._slide(arguments), geometry.layouts["input"].repeats
        in_size = geometry.output_shape[2:]
        out_size = self._adjoint_size(arguments, in_size, shape[2:])
        return {
            "weight": ConvolutionSignature(geometry.n, frames, in_size, out_size, shape, slide),
            "bias": GradientSignature(geometry.n, (geometry.output_shape[1],)),
        }

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer."""
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        return self.function(*(arguments[name] for name in names)), ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The input's gradient is the convolution of the output's."""
        weight, x, g = call.arguments["weight"], call.arguments["input"], call.grad_output
        slide = self._slide(call.arguments)
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            found = self.adjoint(g, weight, None, slide.stride, slide.padding, slide.dilation, slide.groups)
            gradients["input"] = found[(..., *(slice(size) for size in x.shape[2:]))]
        factors: dict[str, Factors] = {}
        layout = call.geometry.layouts["input"]
        if "weight" in call.operands:
            adjoint_size = self._adjoint_size(call.arguments, g.shape[2:], weight.shape[2:])
            missing = [larger - size for larger, size in zip(adjoint_size, x.shape[2:], strict=True)]
            x = F.pad(x, [amount for extra in reversed(missing) for amount in (0, extra)]) if any(missing) else x
            left, right = layout.examples_first(g), layout.examples_first(x)
            factors["weight"] = Convolution(left, right, tuple(weight.shape), slide)
        if "bias" in call.operands:
            n, frames, channels, *size = call.grad_output_examples_first.shape
            rows = call.grad_output_examples_first.reshape(n, frames, channels, math.prod(size))
            factors["bias"] = Gradient(sum_positions(rows.sum(3)))
        return gradients, factors


TRANSPOSED_CONVOLUTIONS = (
    TransposedConvolution(1, "conv_transpose1d", (torch.conv_transpose1d,), torch.conv_transpose1d, torch.conv1d),
    TransposedConvolution(2, "conv_transpose2d", (torch.conv_transpose2d,), torch.conv_transpose2d, torch.conv2d),
    TransposedConvolution(3, "conv_transpose3d", (torch.conv_transpose3d,), torch.conv_transpose3d, torch.conv3d),
)
