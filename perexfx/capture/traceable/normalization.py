"""The forwards of torch's normalisations without control flow on values, and of the one of weights that keeps state.

Promises: the numbers of torch's forwards. Batch norm does not count its batches: batch statistics are refused later.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm

from perexfx.capture.traceable.node import Forward, as_node


def batch_norm(module: _BatchNorm) -> Forward:
    """The functional form, which does not check ranks."""

    def forward(input: Any) -> Any:
        return F.batch_norm(input, *_statistics(module))

    return forward


def instance_norm(module: _InstanceNorm) -> Forward:
    """The functional form, which does not check ranks."""

    def forward(input: Any) -> Any:
        return F.instance_norm(input, *_statistics(module))

    return forward


def _statistics(module: _BatchNorm | _InstanceNorm) -> tuple[Any, ...]:
    """The arguments of the functional form."""
    return (
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        module.momentum if module.momentum is not None else 0.0,
        module.eps,
    )


def spectral_norm(module: _SpectralNorm) -> Forward:
    """With the power iteration as one node, whose results are constants to the parameter expression."""

    def forward(weight: Any) -> Any:
        if "_u" not in module._buffers:
            return F.normalize(weight, dim=0, eps=module.eps)
        matrix = weight.movedim(module.dim, 0).flatten(1)
        state = (matrix.detach(), module._u, module._v)
        found = as_node(power_iteration, *state, module.n_power_iterations, module.eps, module.training)
        return weight / torch.vdot(found[0], torch.mv(matrix, found[1]))

    return forward


def power_iteration(
    matrix: Tensor, u: Tensor, v: Tensor, steps: int, eps: float, training: bool
) -> tuple[Tensor, Tensor]:
    """Estimates of a matrix's first singular vectors; in training, those kept in `u` and `v` are improved first."""
    with torch.no_grad():
        for _ in range(steps if training else 0):
            F.normalize(torch.mv(matrix, v), dim=0, eps=eps, out=u)
            F.normalize(torch.mv(matrix.mH, u), dim=0, eps=eps, out=v)
    return u.clone(), v.clone()
