"""Clipping: from norms to factors.

Promises: factors are of shape [B], zero for examples that are not finite, and for every built-in kind such that no
example contributes more than `clip_norm`. What a user's own function returns must have that shape.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from perexfx.ir.errors import ArgumentError
from perexfx.runtime.tape import Tape


def clip_factors_of(tape: Tape, norms: Tensor, lost: Tensor) -> dict[str, Tensor]:
    """Group -> factors `[B]`; zero for examples that are not finite."""
    settings = tape.settings
    groups = list(tape.sites.groups)
    if settings.clipping == "per_layer":
        share = None if settings.clip_norm is None else settings.clip_norm / math.sqrt(len(groups))
        zero = torch.zeros_like(norms)
        layer_norms = [tape.squared_norms.get(group, zero).sqrt() * tape.scale for group in groups]
        each = [_flat(layer_norm, share) for layer_norm in layer_norms]
        return {g: _without(lost, own, norms.dtype) for g, own in zip(groups, each, strict=True)}
    if callable(settings.clipping):
        factors = _checked(settings.clipping(norms.clone()), norms)  # which may change what it is given
    elif settings.clipping == "automatic":
        factors = _automatic(norms, settings.clip_norm)
    else:
        factors = _flat(norms, settings.clip_norm)
    return dict.fromkeys(groups, _without(lost, factors, norms.dtype))


def _without(lost: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    return factors.to(dtype).masked_fill(lost, 0)


def _flat(norms: Tensor, clip_norm: float | None) -> Tensor:
    """`min(1, C / norm)`: Abadi et al. 2016, arXiv:1607.00133."""
    return torch.ones_like(norms) if clip_norm is None else (clip_norm / norms).clamp(max=1)


AUTOMATIC_STABILITY = 0.01
"""gamma of automatic clipping (AUTO-S)."""


def _automatic(norms: Tensor, clip_norm: float | None) -> Tensor:
    """`C / (norm + gamma)`: AUTO-S of Bu et al. 2022, arXiv:2206.07136."""
    return torch.ones_like(norms) if clip_norm is None else clip_norm / (norms + AUTOMATIC_STABILITY)


def _checked(factors: Any, norms: Tensor) -> Tensor:
    if not isinstance(factors, Tensor) or factors.shape != norms.shape:
        found = list(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ArgumentError(
            f"`clipping` must return one factor per example, shape {list(norms.shape)}. Found {found}. "
            "It is called with the norms of the examples."
        )
    if isinstance(factors, FakeTensor) and not isinstance(norms, FakeTensor):
        raise ArgumentError(
            "`clipping` returned a tensor without numbers: it has kept one from when its step was made a graph. Give "
            "`step_graph`, `compile_step` and `export_onnx` a function of the norms alone."
        )
    return factors.detach()
