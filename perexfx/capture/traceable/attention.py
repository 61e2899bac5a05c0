"""The forward of nn.MultiheadAttention without control flow on values.

Promises: the numbers of torch's forward for batched inputs, but for the fast path that it takes without gradients. What
depends on the ranks and dtypes of masks happens inside one node, `attend`, which reads no parameter: tracing need not
know them, and the analysis follows the operations in it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perexfx.capture.traceable.node import Forward, as_node


def multihead_attention(module: nn.MultiheadAttention) -> Forward:
    """`nn.MultiheadAttention.forward` for batched inputs."""

    def forward(
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any = None,
        need_weights: bool = True,
        attn_mask: Any = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Any, Any]:
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint")
        projected = _projected(module, query, key, value)
        options = {
            "has_bias_row": module.bias_k is not None,
            "has_zero_row": module.add_zero_attn,
            "dropout": module.dropout,
            "training": module.training,
            "is_causal": is_causal,
            "average_weights": average_attn_weights if need_weights else None,
        }
        heads = tuple(_split_heads(module, x) for x in projected)
        attended = as_node(attend, *heads, attn_mask, key_padding_mask, **options)
        output = F.linear(_join_heads(module, attended[0]), module.out_proj.weight, module.out_proj.bias)
        return output, attended[1] if need_weights else None

    return forward


def _projected(module: nn.MultiheadAttention, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Queries, keys and values, as one product where all three are of one tensor."""
    width, packed, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
    if packed is not None and query is key and key is value:
        q, k, v = F.linear(query, packed, bias).chunk(3, dim=-1)
    else:
        thirds = [slice(at * width, (at + 1) * width) for at in range(3)]
        weights: list[Any] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        if packed is not None:
            weights = [packed[third] for third in thirds]
        biases = [None if bias is None else bias[third] for third in thirds]
        q, k, v = map(F.linear, (query, key, value), weights, biases)
    if module.bias_k is not None and module.bias_v is not None:
        row = k.new_zeros((key.shape[0], 1, width) if module.batch_first else (1, key.shape[1], width))
        axis = 1 if module.batch_first else 0
        k = torch.cat([k, row + module.bias_k], dim=axis)
        v = torch.cat([v, row + module.bias_v], dim=axis)
    return q, k, v


def _split_heads(module: nn.MultiheadAttention, x: Any) -> Any:
    """[N, L, E] or [L, N, E] to [N, H, L, E / H]."""
    x = x.unflatten(-1, (module.num_heads, module.head_dim))
    return x.movedim(1 if module.batch_first else 0, -2)


def _join_heads(module: nn.MultiheadAttention, x: Any) -> Any:
    """[N, H, L, E / H] to [N, L, E] or [L, N, E]."""
    return x.movedim(-2, 1 if module.batch_first else 0).flatten(2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    has_bias_row: bool,
    has_zero_row: bool,
    dropout: float,
    training: bool,
    is_causal: bool,
    average_weights: bool | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention as torch.nn.functional.multi_head_attention_forward computes it between its projections.

    Args:
        query: Shape [N, H, L, D].
        key: Shape [N, H, S, D].
        value: Shape [N, H, S, D].
        attn_mask: Shape [L, S] or [N * H, L, S]: True where it must not look, or numbers to add.
        key_padding_mask: Shape [N, S], in the same way.
        has_bias_row: The last key and value are a learned row, which no mask covers.
        has_zero_row: Another key and value of zeros follows.
        dropout: Of the weights, in training.
        training: Whether dropout is at work.
        is_causal: `attn_mask` is the causal one; torch, and this, then take it for granted where that is faster.
        average_weights: Whether the weights are averaged over heads; None: they are not needed.

    Returns:
        Shape [N, H, L, D], and the weights, if needed: [N, L, S] or [N, H, L, S].
    """
    if query.dim() != 4:
        raise RuntimeError("queries, keys and values should have three axes, one of them for the batch")
    if key.shape[0] != query.shape[0]:
        raise RuntimeError(f"the batch sizes of query and key differ: {query.shape[0]} and {key.shape[0]}")
    if has_zero_row:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    unmasked = has_bias_row + has_zero_row
    by_hint = is_causal and key_padding_mask is None and average_weights is None
    mask = None if by_hint else _joined_mask(query, key, attn_mask, key_padding_mask, unmasked)
    probability = dropout if training else 0.0
    if average_weights is None:
        return F.scaled_dot_product_attention(query, key, value, mask, probability, by_hint), None
    scores = query * math.sqrt(1.0 / query.shape[-1]) @ key.transpose(-2, -1)
    weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), probability)
    return weights @ value, weights.mean(dim=1) if average_weights else weights


def _joined_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, unmasked: int
) -> Tensor | None:
    """Both masks as one to add to the scores, [L, S] or [N, 1 or H, 1 or L, S]; the last keys are in neither."""
    n, heads, length, _ = query.shape
    source = key.shape[2] - unmasked
    found = []
    if attn_mask is not None:
        _check_shape("attn_mask", attn_mask, (length, source), (n * heads, length, source))
        found.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads)))
    if key_padding_mask is not None:
        _check_shape("key_padding_mask", key_padding_mask, (n, source))
        found.append(key_padding_mask[:, None, None])
    masks = [additive_mask(mask, query.dtype) for mask in found]
    mask = sum(masks[1:], masks[0]) if masks else None
    return F.pad(mask, (0, unmasked)) if mask is not None and unmasked else mask


def _check_shape(name: str, mask: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in allowed:
        expected = " or ".join(str(list(shape)) for shape in allowed)
        raise RuntimeError(f"{name} should be of shape {expected}, and is of shape {list(mask.shape)}")


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: minus infinity where a boolean one is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
