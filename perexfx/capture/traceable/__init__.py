"""Forwards of torch.nn modules without control flow on values, for tracing.

Promises: while one traces, a module whose forward is torch's own computes the same by operations that torch.fx can
record. A forward that somebody else wrote is never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized

from perexfx.capture.traceable.attention import multihead_attention
from perexfx.capture.traceable.node import Forward
from perexfx.capture.traceable.normalization import batch_norm, instance_norm, spectral_norm
from perexfx.capture.traceable.recurrent import gru, gru_cell, lstm, lstm_cell, rnn_cell, rnn_layer
from perexfx.capture.traceable.transformer import decoder, encoder, encoder_layer, transformer


def forward_of(module: nn.Module) -> Forward | None:
    """A forward with the signature of the module's own that can be traced; None where its own is kept."""
    make = _FORWARDS.get(getattr(type(module), "forward", None))
    if make is None or "forward" in vars(module):
        return None
    _refuse_repeated_reads(module)
    return make(module)


def _refuse_repeated_reads(module: nn.Module) -> None:
    """Reading a parameter improves the estimate of its spectral norm, and torch reads these more than once."""
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and is_parametrized(module) and module.training:
        assert isinstance(module.parametrizations, nn.Module)
        if any(isinstance(inner, _SpectralNorm) for inner in module.parametrizations.modules()):
            raise RuntimeError("torch updates the spectral norm of its parameters several times in one forward")


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """The module with a forward that can be traced; its hooks run as always."""
    forward = forward_of(module)
    if forward is None:
        yield
        return
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


_FORWARDS: dict[Any, Callable[[Any], Forward]] = {
    _BatchNorm.forward: batch_norm,
    _InstanceNorm.forward: instance_norm,
    _SpectralNorm.forward: spectral_norm,
    nn.GRU.forward: gru,
    nn.GRUCell.forward: gru_cell,
    nn.LSTM.forward: lstm,
    nn.LSTMCell.forward: lstm_cell,
    nn.MultiheadAttention.forward: multihead_attention,
    nn.RNN.forward: rnn_layer,
    nn.RNNCell.forward: rnn_cell,
    nn.SyncBatchNorm.forward: batch_norm,
    nn.Transformer.forward: transformer,
    nn.TransformerDecoder.forward: decoder,
    nn.TransformerEncoder.forward: encoder,
    nn.TransformerEncoderLayer.forward: encoder_layer,
}
"""From torch's own forward, which subclasses share unless they define another, to what makes its replacement."""
