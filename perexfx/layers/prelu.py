"""`prelu`: `y = x` where x is positive, `w x` elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule
from perexfx.layers.elementwise import reduce_to


@dataclass(frozen=True)
class PReLU(Rule):
    """One slope per channel (axis 1), or one for all."""

    kind = "prelu"
    targets = (F.prelu, "prelu")
    operands = ("weight",)
    inputs = ("input",)

    @staticmethod
    def named(input: Any, weight: Any) -> dict[str, Any]:
        """As `torch.nn.functional.prelu`."""
        return {"input": input, "weight": weight}

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """One slope per example."""
        if geometry.layouts["input"].axis == 1 and geometry.shapes["weight"] not in ((1,), ()):
            return "its slopes run along the examples"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        return {"weight": GradientSignature(geometry.n, geometry.shapes["weight"])}

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer."""
        return F.prelu(arguments["input"], arguments["weight"]), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """Both: the sign of the input decides."""
        return ("input", "weight")

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The slope's gradient is that of the negative inputs."""
        x, weight, g = call.arguments["input"], call.arguments["weight"], call.grad_output
        shape = call.geometry.shapes["weight"]
        along = (*shape, *[1] * (x.dim() - 2)) if x.dim() > 1 and weight.numel() > 1 else (1,) * min(1, x.dim())
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            gradients["input"] = torch.where(x > 0, g, g * weight.reshape(along))
        factors: dict[str, Factors] = {}
        if "weight" in call.operands:
            value = torch.where(x > 0, 0, g * x)
            reduced = reduce_to(value, call.geometry.output_layout, along)
            factors["weight"] = Gradient(reduced.reshape(reduced.shape[0], *shape))
        return gradients, factors
