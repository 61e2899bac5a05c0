"""Squared norms of gradients that are at hand.

Promises: accumulated in float32 at least and in blocks, so that no digits are lost over millions of entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NORM_BLOCK = 1024
"""Squares are added in blocks: one float32 accumulator over millions of entries would lose five digits."""


def squared_norms_of(gradients: Tensor) -> Tensor:
    """Squared norm of each example's entries, accumulated in float32 at least, without temporaries of their size.

    Args:
        gradients: Shape `[n, ...]`.
    """
    return block_norms(gradients).square().sum(1)


def block_norms(gradients: Tensor) -> Tensor:
    """Norms of blocks of each example's entries, in float32 at least. Shape `[n, blocks]`.

    Args:
        gradients: Shape `[n, ...]`.
    """
    n, size = gradients.shape[0], math.prod(gradients.shape[1:])
    whole, rest = divmod(size, NORM_BLOCK)
    if whole == 0:
        return _norm(gradients.reshape(n, 1, size))
    if rest == 0:
        return _norm(gradients.reshape(n, whole, NORM_BLOCK))
    blocks, last = gradients.reshape(n, size).split([size - rest, rest], dim=1)
    return torch.cat([_norm(blocks.unflatten(1, (whole, NORM_BLOCK))), _norm(last.unsqueeze(1))], dim=1)


def _norm(value: Tensor) -> Tensor:
    dtype = torch.promote_types(value.dtype, torch.float32)
    return torch.linalg.vector_norm(value, dim=-1, dtype=dtype)


__all__ = ["block_norms", "squared_norms_of"]
