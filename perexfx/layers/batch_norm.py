"""`batch_norm` with frozen statistics: a scale and a shift per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule


@dataclass(frozen=True)
class FrozenBatchNorm(Rule):
    """`y = w * (x - running_mean) / running_std + b`: `n t c (normalised input), n t c -> n c`."""

    kind = "batch_norm"
    targets = (F.batch_norm,)
    operands = ("weight", "bias")
    inputs = ("input",)

    @staticmethod
    def named(
        input: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: Any = False,
        momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.batch_norm`."""
        return dict(locals())

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
        """The ordinary layer."""
        names = ("input", "running_mean", "running_var", "weight", "bias")
        return F.batch_norm(*(arguments[name] for name in names), training=False, eps=arguments["eps"]), ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Everything is a product with constants per channel."""
        x, mean, variance, weight = (
            call.arguments[name] for name in ("input", "running_mean", "running_var", "weight")
        )
        rstd = torch.rsqrt(variance + call.arguments["eps"])
        along = (1, -1, *[1] * (x.dim() - 2))
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            scale = rstd if weight is None else rstd * weight
            gradients["input"] = call.grad_output * scale.view(along)
        found = {}
        if "weight" in call.operands:
            found["weight"] = call.grad_output * (x - mean.view(along)) * rstd.view(along)
        if "bias" in call.operands:
            found["bias"] = call.grad_output
        layout, axes = call.geometry.layouts["input"], tuple(range(3, x.dim() + 1))
        factors: dict[str, Factors] = {}
        for name, value in found.items():
            rows = layout.examples_first(value)
            factors[name] = Gradient((rows.sum(axes) if axes else rows).sum(1))
        return gradients, factors
