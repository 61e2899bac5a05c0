"""`linear` with any number of leading axes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Product, ProductSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, sum_positions
from perexfx.kernels.gemm import linear


@dataclass(frozen=True)
class Linear(Rule):
    """`y = x W^T + b`: `n t i, n t o -> n o i`, where t runs over every axis but examples and features."""

    kind = "linear"
    targets = (F.linear,)
    operands = ("weight", "bias")
    inputs = ("input",)

    @staticmethod
    def named(input: Any, weight: Any, bias: Any = None) -> dict[str, Any]:
        """As `torch.nn.functional.linear`."""
        return {"input": input, "weight": weight, "bias": bias}

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Weights that are not matrices."""
        if len(geometry.shapes["weight"]) != 2:
            return "its weight is not a matrix"
        return None

    def weighed_axes(self, operand: str) -> Collection[int]:
        """Both of the weight, that of the bias."""
        return (0, 1)

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """A product of input and output gradient; the bias' gradients at hand."""
        o, i = geometry.shapes["weight"]
        repeats = geometry.layouts["input"].repeats
        *lead, _ = geometry.shapes["input"]
        others = math.prod(size for axis, size in enumerate(lead) if axis != geometry.layouts["input"].axis)
        return {
            "weight": ProductSignature(geometry.n, 1, repeats * others, i, o, (o, i)),
            "bias": GradientSignature(geometry.n, (o,)),
        }

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer."""
        layer_input, weight, bias = (arguments[name] for name in ("input", "weight", "bias"))
        if layer_input.dim() < 2 or not layer_input.is_contiguous():
            return F.linear(layer_input, weight, bias), ()
        o, i = weight.shape
        *lead, _ = layer_input.shape
        return linear(layer_input.view(math.prod(lead), i), weight, bias).view(*lead, o), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """Each factor of the product for the gradient of the other."""
        return [name for name, other in (("weight", inputs), ("input", set(operands) & {"weight"})) if other]

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """`g W` for the input."""
        o, i = call.geometry.shapes["weight"]
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            grad_output, weight = call.grad_output, call.arguments["weight"]
            rows = linear(grad_output.reshape(math.prod(grad_output.shape[:-1]), o), weight.t())
            gradients["input"] = rows.view(*grad_output.shape[:-1], i)
        n = call.geometry.n
        right = call.grad_output_examples_first
        t = math.prod(right.shape[1:-1])
        right = right.reshape(n, t, o)
        factors: dict[str, Factors] = {}
        if "weight" in call.operands:
            left = call.examples_first("input").reshape(n, 1, t, i)
            factors["weight"] = Product(left, right.unsqueeze(1), (o, i))
        if "bias" in call.operands:
            factors["bias"] = Gradient(sum_positions(right))
        return gradients, factors
