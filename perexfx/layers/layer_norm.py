"""`layer_norm` and `rms_norm`: normalised over the last axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, sum_positions


def _affine_signatures(geometry: Geometry) -> dict[str, Signature]:
    names = [name for name in ("weight", "bias") if name in geometry.shapes]
    return {name: GradientSignature(geometry.n, geometry.shapes[name]) for name in names}


def _positions(value: Tensor, shape: Sequence[int]) -> Tensor:
    """`[n, repeats, *positions, *shape]` as `[n, t, c]`."""
    kept = value.shape[1 : value.dim() - len(shape)]
    return value.reshape(value.shape[0], math.prod(kept), math.prod(shape))


def _weighted_sum_of_positions(weights: Tensor, values: Tensor) -> Tensor:
    """`n t, n t c -> n c`, in one pass over `values`."""
    return (weights.unsqueeze(1) @ values).squeeze(1)


@dataclass(frozen=True)
class LayerNorm(Rule):
    """`y = w * (x - mean) / std + b`: `n t c (normalised input), n t c -> n c`."""

    kind = "layer_norm"
    targets = (F.layer_norm, torch.layer_norm)
    operands = ("weight", "bias")
    inputs = ("input",)

    @staticmethod
    def named(
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: Any = 1e-5,
        cudnn_enable: Any = True,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.layer_norm`."""
        return dict(locals())

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        return _affine_signatures(geometry)

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer; mean and inverse deviation are kept."""
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        output, mean, rstd = torch.native_layer_norm(*(arguments[name] for name in names))
        return output, (mean, rstd)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Torch's own kernel for the input; one pass over input and output gradient for weight and bias."""
        x, shape, weight = (call.arguments[name] for name in ("input", "normalized_shape", "weight"))
        mean, rstd = call.residuals
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            gradients["input"] = torch.ops.aten.native_layer_norm_backward(
                call.grad_output.contiguous(), x, shape, mean, rstd, weight, None, [True, False, False]
            )[0]
        factors: dict[str, Factors] = {}
        right = _positions(call.grad_output_examples_first, shape)
        if "weight" in call.operands:
            layout = call.geometry.layouts["input"]
            centred = _positions(layout.examples_first(x), shape)
            centred = centred - _positions(layout.examples_first(mean), [1] * len(shape))
            scales = _positions(layout.examples_first(rstd), [1] * len(shape)).squeeze(2)
            total = _weighted_sum_of_positions(scales.to(right.dtype), centred.to(right.dtype).mul_(right))
            factors["weight"] = Gradient(total.reshape(-1, *shape))
        if "bias" in call.operands:
            factors["bias"] = Gradient(sum_positions(right).reshape(-1, *shape))
        return gradients, factors


@dataclass(frozen=True)
class RMSNorm(Rule):
    """`y = w * x / rms(x)`: `n t c (normalised input), n t c -> n c`."""

    kind = "rms_norm"
    targets = (F.rms_norm, torch.rms_norm)
    operands = ("weight",)
    inputs = ("input",)

    @staticmethod
    def named(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> dict[str, Any]:
        """As `torch.nn.functional.rms_norm`."""
        return dict(locals())

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Gradients at hand."""
        return _affine_signatures(geometry)

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer; the inverse root mean square is kept."""
        x, shape, weight, eps = (arguments[name] for name in ("input", "normalized_shape", "weight", "eps"))
        axes = tuple(range(-len(shape), 0))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return F.rms_norm(x, shape, weight, eps), (wide.square().mean(axes, keepdim=True).add_(eps).rsqrt_(),)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """`dx = r (w g - xhat mean(w g xhat))` with `xhat = r x`."""
        x, shape, weight = (call.arguments[name] for name in ("input", "normalized_shape", "weight"))
        (rstd,) = call.residuals
        normalised = (x * rstd).to(x.dtype)
        gradients: dict[str, Tensor] = {}
        if "input" in call.inputs:
            scaled = call.grad_output * weight
            axes = tuple(range(-len(shape), 0))
            along = (scaled * normalised).mean(axes, keepdim=True)
            gradients["input"] = ((scaled - normalised * along) * rstd).to(x.dtype)
        products = call.grad_output * normalised
        products = _positions(call.geometry.output_layout.examples_first(products), shape)
        return gradients, {"weight": Gradient(sum_positions(products).reshape(-1, *shape))}
