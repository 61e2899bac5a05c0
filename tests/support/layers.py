"""One instance of every layer of `torch.nn` that has parameters, each as a model of its own.

`tests/layers/test_layers.py` holds each to one example at a time; `tests/support/supported.py` makes a table of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.cases import Case, ids, images
from tests.support.cases_attention import randomized


class First(nn.Module):
    """A layer of which the first result is used, examples first."""

    def __init__(self, layer: nn.Module, batch_dim: int = 0, times: int = 1) -> None:
        super().__init__()
        self.layer, self.batch_dim, self.times = layer, batch_dim, times

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        output = self.layer(*[x] * self.times) if y is None else self.layer(x, y)
        output = output[0] if isinstance(output, tuple) else output
        return output.movedim(self.batch_dim, 0)


def _frozen(layer: nn.Module) -> nn.Module:
    """With statistics of its own, which it keeps."""
    for buffer in (layer.running_mean, layer.running_var):
        assert isinstance(buffer, Tensor)
        nn.init.uniform_(buffer, 0.5, 1.5)
    return layer.eval()


LAYERS: list[Case] = []


def _add(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Tensor, ...]],
    *,
    batch_dim: int = 0,
    times: int = 1,
    name: str = "",
) -> None:
    name = name or type(make()).__name__
    LAYERS.append(Case(name, lambda: First(randomized(make()), batch_dim, times), inputs, batch_dim))


def _sequences(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(shape[0], n, *shape[1:]),)


_add(lambda: nn.Linear(4, 3), images(4))
_add(lambda: nn.Bilinear(4, 3, 2), lambda n: (torch.randn(n, 4), torch.randn(n, 3)))
for _rank, _kinds in enumerate([(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d)], start=1):
    for _kind in _kinds:
        _add(lambda kind=_kind: kind(2, 4, 3, stride=2, padding=1, groups=2), images(2, *[7, 6][:_rank]))
_add(lambda: nn.Conv3d(2, 4, 2, groups=2), images(2, 4, 3, 3))
_add(lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, output_padding=1, groups=2), images(2, 2, 3, 2))
_add(lambda: nn.Embedding(7, 3, padding_idx=2), ids(7, 5))
_add(lambda: nn.EmbeddingBag(7, 3, mode="mean"), ids(7, 5))
_add(lambda: nn.LayerNorm([5, 4]), images(5, 4))
_add(lambda: nn.RMSNorm(4), images(5, 4))
_add(lambda: nn.GroupNorm(2, 4), images(4, 5))
for _instance, _batch, _shape in (
    (nn.InstanceNorm1d, nn.BatchNorm1d, [5]),
    (nn.InstanceNorm2d, nn.BatchNorm2d, [5, 3]),
    (nn.InstanceNorm3d, nn.BatchNorm3d, [3, 3, 2]),
):
    _add(lambda kind=_instance: kind(3, affine=True), images(3, *_shape))
    _add(lambda kind=_batch: _frozen(kind(3)), images(3, *_shape))
_add(lambda: _frozen(nn.SyncBatchNorm(3)), images(3, 4))
_add(lambda: nn.PReLU(3), images(3, 4))
for _layer in (nn.RNN, nn.GRU, nn.LSTM):
    _add(lambda kind=_layer: kind(4, 3, num_layers=2, bidirectional=True), _sequences(5, 4), batch_dim=1)
for _cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    _add(lambda kind=_cell: kind(4, 3), images(4))
_add(lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True), images(5, 4), times=3)
_options: dict[str, Any] = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0, "batch_first": True}
_encoder, _decoder = nn.TransformerEncoderLayer(**_options), nn.TransformerDecoderLayer(**_options)
_add(lambda: nn.TransformerEncoderLayer(**_options), images(5, 4))
_add(lambda: nn.TransformerDecoderLayer(**_options), images(5, 4), times=2)
_add(lambda: nn.TransformerEncoder(_encoder, 2, enable_nested_tensor=False), images(5, 4))
_add(lambda: nn.TransformerDecoder(_decoder, 2), images(5, 4), times=2)
_add(
    lambda: nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **_options),
    lambda n: (torch.randn(n, 5, 4), torch.randn(n, 3, 4)),
)
for _parametrize in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
    _add(lambda wrap=_parametrize: wrap(nn.Linear(4, 4)).eval(), images(4), name=f"Linear, {_parametrize.__name__}")

NOT_LAYERS = {
    "RNNBase": "of nn.RNN, nn.GRU and nn.LSTM",
    "RNNCellBase": "of nn.RNNCell, nn.GRUCell and nn.LSTMCell",
    "AdaptiveLogSoftmaxWithLoss": "sorts the examples by their targets, and selects as many as there are of each kind",
}
"""Classes of `torch.nn` with parameters that have no row, and why."""
