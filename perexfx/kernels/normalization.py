"""Kernels of norm layers."""

from __future__ import annotations

import torch
from torch import Tensor

from perexfx.kernels.loading import typed
from perexfx.kernels.tensors import library_for, pointer


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Group normalisation of images with their channels last: the result, and mean and inverse deviation of each
    example's groups; None where there is no kernel for these tensors.

    Args:
        x: Shape `[n, C, H, W]`, channels last.
        weight: Shape `[C]`, contiguous, or None.
        bias: The same.
        groups: Of channels.
        eps: Added to the variance.
    """
    n, channels, height, width = x.shape
    if (library := library_for(*(v for v in (x, weight, bias) if v is not None))) is None:
        return None
    found, mean, rstd = torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)
    memories = (pointer(value) for value in (x, weight, bias, found, mean, rstd))
    run = typed(library, "group_norm", x.dtype)
    run(*memories, n, height * width, channels, groups, eps, torch.get_num_threads())
    return found, mean, rstd


def group_norm_back(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of the input of `group_norm`, and of its weight and bias for each example, `[n, C]`; None where there
    is no kernel for these tensors.

    Args:
        grad_output: Shape `[n, C, H, W]`, channels last.
        x: The same.
        weight: Shape `[C]`, contiguous, or None.
        mean: Shape `[n, groups]`, contiguous.
        rstd: The same.
    """
    n, channels, height, width = x.shape
    given = (grad_output, x, weight, mean, rstd)
    if (library := library_for(*(v for v in given if v is not None))) is None:
        return None
    found = torch.empty_like(x), x.new_empty(n, channels), x.new_empty(n, channels)
    memories = (pointer(value) for value in (*given, *found))
    run = typed(library, "group_norm_back", x.dtype)
    run(*memories, n, height * width, channels, mean.shape[1], torch.get_num_threads())
    return found
