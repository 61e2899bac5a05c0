"""Softmax attention and its backward, by products and a softmax.

Promises: each finds what torch's own operation finds, up to rounding; a row that sees nothing is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention, and the logarithm of what its weights are divided by."""
    key, value = (_of_every_head(each, query) for each in (key, value))
    scores = _scores(query, key, is_causal, attn_mask, scale)
    found = (_weights(scores) @ value).transpose(1, 2).contiguous().transpose(1, 2)  # as torch's kernel lays it out
    return found, scores.logsumexp(-1)


def any_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` without dropout."""
    if enable_gqa:
        key, value = (_of_every_head(each, query) for each in (key, value))
    return _weights(_scores(query, key, is_causal, attn_mask, scale)) @ value


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    shared = query.shape[1] // key.shape[1]
    key, value = (_of_every_head(each, query) for each in (key, value))
    weights = _weights(_scores(query, key, is_causal, attn_mask, scale))
    of_weights = grad_out @ value.transpose(-2, -1)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_scores = of_scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    of_keys, of_values = of_scores.transpose(-2, -1) @ query, weights.transpose(-2, -1) @ grad_out
    if shared > 1:
        of_keys, of_values = (each.unflatten(1, (-1, shared)).sum(2) for each in (of_keys, of_values))
    found = (of_scores @ key, of_keys, of_values)
    return tuple(g.transpose(1, 2).contiguous().transpose(1, 2) for g in found)  # pyright: ignore[reportReturnType]


def _of_every_head(value: Tensor, query: Tensor) -> Tensor:
    """Keys or values with those that several heads of the queries share repeated: `[..., heads, rows, columns]`."""
    shared = query.shape[-3] // value.shape[-3] if query.dim() > 3 else 1
    return value if shared == 1 else value.repeat_interleave(shared, -3)


def _weights(scores: Tensor) -> Tensor:
    """A row that sees nothing has weights of zero, as in torch's kernel."""
    return torch.where((scores == -math.inf).all(-1, keepdim=True), 0.0, scores.softmax(-1))


def _scores(query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        places = [torch.arange(size, device=query.device) for size in scores.shape[-2:]]
        scores = scores.masked_fill(places[1] > places[0][:, None], -math.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask


ATTENTION: Mapping[Any, Callable[..., Any]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
}


__all__ = ["ATTENTION", "any_attention"]
