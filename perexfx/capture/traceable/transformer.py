"""The forwards of the transformer modules of torch.nn without control flow on values.

Promises: the numbers of torch's forwards for batched inputs, with every mask applied. Left out are the fast paths that
torch takes without gradients (the one by nested tensors returns zeros at padded positions), and guessing whether a mask
is the causal one, which is about speed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from perexfx.capture.traceable.attention import additive_mask
from perexfx.capture.traceable.node import Forward, as_node


def encoder_layer(module: nn.TransformerEncoderLayer) -> Forward:
    """`nn.TransformerEncoderLayer.forward` without its fast path."""

    def forward(src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False) -> Any:
        masks = (_additive(src, src_mask), _additive(src, src_key_padding_mask))
        if module.norm_first:
            x = src + module._sa_block(module.norm1(src), *masks, is_causal=is_causal)
            return x + module._ff_block(module.norm2(x))
        x = module.norm1(src + module._sa_block(src, *masks, is_causal=is_causal))
        return module.norm2(x + module._ff_block(x))

    return forward


def _additive(x: Any, mask: Any) -> Any:
    return None if mask is None else as_node(additive_mask, mask, x.dtype)


def encoder(module: nn.TransformerEncoder) -> Forward:
    """`nn.TransformerEncoder.forward` without nested tensors."""

    def forward(src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None) -> Any:
        mask, src_key_padding_mask = _additive(src, mask), _additive(src, src_key_padding_mask)
        output = src
        for layer in module.layers:
            output = layer(output, src_mask=mask, is_causal=bool(is_causal), src_key_padding_mask=src_key_padding_mask)
        return output if module.norm is None else module.norm(output)

    return forward


def decoder(module: nn.TransformerDecoder) -> Forward:
    """`nn.TransformerDecoder.forward`."""

    def forward(
        tgt: Any,
        memory: Any,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        output = tgt
        for layer in module.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return output if module.norm is None else module.norm(output)

    return forward


def transformer(module: nn.Transformer) -> Forward:
    """`nn.Transformer.forward` without its checks of shapes, which the operations inside make too."""

    def forward(
        src: Any,
        tgt: Any,
        src_mask: Any = None,
        tgt_mask: Any = None,
        memory_mask: Any = None,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Any:
        memory = module.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=src_is_causal)
        return module.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )

    return forward
