"""`bilinear`: `y_o = x1^T W_o x2 + b_o`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Product, ProductSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, sum_positions


@dataclass(frozen=True)
class Bilinear(Rule):
    """`n t (i j), n t o -> n o (i j)`, where the left factor is the outer product of the two inputs."""

    kind = "bilinear"
    targets = (F.bilinear,)
    operands = ("weight", "bias")
    inputs = ("input1", "input2")

    @staticmethod
    def named(input1: Any, input2: Any, weight: Any, bias: Any = None) -> dict[str, Any]:
        """As `torch.nn.functional.bilinear`."""
        return {"input1": input1, "input2": input2, "weight": weight, "bias": bias}

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """A product of the inputs' outer product and the output's gradient; the bias' gradients at hand."""
        o, i, j = geometry.shapes["weight"]
        t = math.prod(geometry.output_shape[:-1]) // geometry.n if geometry.n else 0
        return {
            "weight": ProductSignature(geometry.n, 1, t, i * j, o, (o, i, j)),
            "bias": GradientSignature(geometry.n, (o,)),
        }

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer."""
        return F.bilinear(*(arguments[name] for name in ("input1", "input2", "weight", "bias"))), ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Every gradient is a product of the other two."""
        x1, x2, weight = (call.arguments[name] for name in ("input1", "input2", "weight"))
        o, i, j = call.geometry.shapes["weight"]
        g, n = call.grad_output, call.geometry.n
        gradients: dict[str, Tensor] = {}
        if "input1" in call.inputs:
            gradients["input1"] = torch.einsum("...o,oij,...j->...i", g, weight, x2)
        if "input2" in call.inputs:
            gradients["input2"] = torch.einsum("...o,oij,...i->...j", g, weight, x1)
        right = call.grad_output_examples_first
        t = math.prod(right.shape[1:-1])
        right = right.reshape(n, t, o)
        factors: dict[str, Factors] = {}
        if "weight" in call.operands:
            left = call.examples_first("input1").reshape(n, 1, t, i, 1)
            pairs = (left * call.examples_first("input2").reshape(n, 1, t, 1, j)).reshape(n, 1, t, i * j)
            factors["weight"] = Product(pairs, right.unsqueeze(1), (o, i, j))
        if "bias" in call.operands:
            factors["bias"] = Gradient(sum_positions(right))
        return gradients, factors
