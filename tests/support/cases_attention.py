"""Attention, recurrent cells and parametrizations, among the models of the exactness tests."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.cases import case, images

WIDTH, HEADS = 6, 3


def randomized(module: nn.Module) -> nn.Module:
    """Without the zeros and ones that torch starts with, which would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def attention(**options: Any) -> nn.Module:
    return randomized(nn.MultiheadAttention(WIDTH, HEADS, **options))


def padding(n: int, length: int) -> Tensor:
    """True at padded positions; the first is never one."""
    return torch.arange(length) >= torch.randint(1, length + 1, (n, 1))


@case(images(5, WIDTH))
class attention_self(nn.Module):
    """A constant causal mask; the weights are not needed."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(batch_first=True)
        self.register_buffer("mask", torch.ones(5, 5).triu(1).bool())

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]


@case(lambda n: (torch.randn(5, n, WIDTH),), batch_dim=1)
class attention_time_first(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, x, x)
        return torch.cat([output.transpose(0, 1), weights], dim=2)


@case(lambda n: (torch.randn(n, 5, WIDTH), torch.randn(n, 4, WIDTH), padding(n, 4)))
class attention_cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(batch_first=True)

    def forward(self, x: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
        return self.attention(x, memory, memory, key_padding_mask=padded)[0]


@case(lambda n: (torch.randn(n, 5, WIDTH), torch.randn(n, 4, 3), torch.randn(n, 4, 2), torch.randn(n, 4)))
class attention_of_other_widths(nn.Module):
    """Masks of numbers that are added, one of them learned from by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(kdim=3, vdim=2, batch_first=True)
        self.register_buffer("mask", torch.randn(5, 4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        output, weights = self.attention(
            query, key, value, key_padding_mask=bias, attn_mask=self.mask, average_attn_weights=False
        )
        return torch.cat([output, weights.transpose(1, 2).flatten(2)], dim=2)


@case(lambda n: (torch.randn(n, 5, WIDTH), padding(n, 5)))
class attention_with_learned_rows(nn.Module):
    """Time first within a batch-first model, and a mask of its own for each example and head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention(add_bias_kv=True, add_zero_attn=True)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        mask = (padded[:, None, None] & padded[:, None, :, None]).expand(-1, HEADS, -1, -1).flatten(0, 1)
        x = x.transpose(0, 1)
        return self.attention(x, x, x, attn_mask=mask, key_padding_mask=padded, need_weights=False)[0].transpose(0, 1)


@case(lambda n: (torch.randn(n, 5, WIDTH), padding(n, 5)))
class encoder_layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = randomized(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 7, dropout=0.0, activation="gelu", batch_first=True)
        )

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=padded)


@case(images(5, WIDTH))
class causal_encoder(nn.Module):
    """A causal mask as long as the input, which torch may take for granted."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 7, dropout=0.0, activation=torch.tanh, norm_first=True, bias=False
        )
        self.encoder = randomized(nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.encoder(x.transpose(0, 1), mask, is_causal=True).transpose(0, 1)


@case(lambda n: (torch.randn(n, 4, WIDTH), torch.randn(n, 5, WIDTH), padding(n, 5)))
class decoder_layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = randomized(nn.TransformerDecoderLayer(WIDTH, HEADS, 7, dropout=0.0, batch_first=True))

    def forward(self, x: Tensor, memory: Tensor, padded: Tensor) -> Tensor:
        return self.layer(x, memory, memory_key_padding_mask=padded)


@case(lambda n: (torch.randn(5, n, WIDTH), torch.randn(4, n, WIDTH)), batch_dim=1)
class transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # there is no fast path, in many words
            self.inner = nn.Transformer(WIDTH, HEADS, 1, 1, 7, dropout=0.0, norm_first=True)
        randomized(self.inner)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=source.dtype)
        return self.inner(source, target, tgt_mask=mask).transpose(0, 1)


@case(lambda n: (torch.randn(n, 4, WIDTH), torch.randn(n, WIDTH)))
class cells(nn.Module):
    """Each kind over four steps, the first from zeros and the last from a state that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(WIDTH, 3), nn.GRUCell(3, 4, bias=False)
        self.rnn, self.relu = nn.RNNCell(4, WIDTH), nn.RNNCell(WIDTH, 2, nonlinearity="relu")

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        long, middle = None, None
        for at in range(4):
            long = self.lstm(x[:, at], long)
            middle = self.gru(long[0], middle)
            last = self.rnn(middle, last)
        return self.relu(last)


@case(images(3, 5, 5))
def weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(36, 3), dim=None),
    )


@case(images(WIDTH))
def weight_norm_by_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, 5)), nn.Tanh(), nn.Linear(5, 2))


@case(images(3, 5, 5))
def spectral_norm() -> nn.Module:
    """In eval mode, where it keeps still; test_traceable.py trains it."""
    layers = [
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3), dim=1),
        nn.Flatten(),
        nn.utils.spectral_norm(nn.Linear(36, 3)),
    ]
    return nn.Sequential(*layers).eval()


@case(images(WIDTH))
def orthogonal() -> nn.Module:
    layers = [parametrizations.orthogonal(nn.Linear(WIDTH, size)) for size in (WIDTH, 4)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])
