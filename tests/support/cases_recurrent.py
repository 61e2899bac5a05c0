"""Recurrent models: layers of every kind and form, states from everywhere, and cells in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, case, images, register


def run(layer: nn.RNNBase, x: Tensor, hx: Any) -> Any:
    """What an `nn.LSTM`, `nn.GRU` or `nn.RNN` computes: torch's own operation on its weights."""
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    options = (layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional, layer.batch_first)
    return getattr(torch, layer.mode.lower())(x, hx, weights, *options)


def times(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(5, n, 3),)


class Whole(nn.Module):
    """Zeros at the start; output and last states all reach the loss."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0 if self.layer.batch_first else 1]
        runs = self.layer.num_layers * (2 if self.layer.bidirectional else 1)
        hidden = torch.zeros(runs, n, getattr(self.layer, "proj_size", 0) or self.layer.hidden_size, dtype=x.dtype)
        hx = [hidden, torch.zeros(runs, n, self.layer.hidden_size, dtype=x.dtype)]
        is_lstm = self.layer.mode == "LSTM"
        result = run(self.layer, torch.tanh(self.head(x)), hx if is_lstm else hidden)
        output, last = result[0], [result[1], result[2]] if is_lstm else [result[1]]
        output = output if self.layer.batch_first else output.transpose(0, 1)
        parts = [output.cumsum(1).flatten(1), *(state.transpose(0, 1).flatten(1) for state in last)]
        return torch.cat(parts, 1)


_KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
_FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("lstm gru rnn_tanh rnn_relu", "", {}),
    ("lstm gru rnn_relu", "two_layers", {"num_layers": 2}),
    ("lstm gru rnn_tanh", "two_ways", {"bidirectional": True}),
    ("lstm gru rnn_tanh", "two_layers_two_ways_no_bias", {"num_layers": 2, "bidirectional": True, "bias": False}),
    ("lstm gru rnn_relu", "batch_first", {"batch_first": True, "num_layers": 2}),
]


def _whole(kind: str, form: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: Whole(_KINDS[kind](3, 4, **form))


for _kinds, _suffix, _form in _FORMS:
    for _kind in _kinds.split():
        _name = f"{_kind}_{_suffix}".rstrip("_")
        _inputs, _batch_dim = (images(5, 3), 0) if _suffix == "batch_first" else (times, 1)
        register(Case(_name, _whole(_kind, _form), _inputs, _batch_dim))


@case(images(5, 3))
def lstm_projected() -> nn.Module:
    return Whole(nn.LSTM(3, 4, proj_size=2, batch_first=True, num_layers=2, bidirectional=True))


@case(times, batch_dim=1)
def lstm_projected_no_bias() -> nn.Module:
    return Whole(nn.LSTM(3, 4, proj_size=2, bias=False))


@case(images(1, 3))
def lstm_one_time() -> nn.Module:
    return Whole(nn.LSTM(3, 4, batch_first=True))


@case(images(40, 3))
def lstm_many_times() -> nn.Module:
    return Whole(nn.LSTM(3, 2, batch_first=True))


@case(images(3))
def gru_one_time() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), Whole(nn.GRU(3, 4, batch_first=True)))


@case(lambda n: (torch.randn(5, n, 3), torch.randn(2, n, 4), torch.randn(2, n, 4)), batch_dim=1)
class lstm_given_states(nn.Module):
    """States from outside and from layers; a loss of the last states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first = nn.LSTM(3, 4, bidirectional=True), nn.Linear(4, 4)

    def forward(self, x: Tensor, h0: Tensor, c0: Tensor) -> Tensor:
        _, (h, c) = self.last(x, self.first(h0), torch.tanh(self.first(c0)))
        return torch.cat([h, c], 2).transpose(0, 1)

    def last(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Any]:
        result = run(self.layer, x, (h0, c0))
        return result[0], result[1:]


@case(lambda n: (torch.randn(n, 5, 3), torch.randn(n, 4)))
class gru_given_state(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor, h0: Tensor) -> Tensor:
        return run(self.layer, x, self.first(h0).unsqueeze(0))[1].squeeze(0)


@case(images(5, 3))
class lstm_learned_states(nn.Module):
    """Initial states that are parameters, copied to every example; only the output is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4, 2, batch_first=True)
        self.h0, self.c0 = nn.Parameter(torch.randn(2, 1, 4)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        return run(self.layer, x, [self.h0.expand(-1, n, -1), self.c0.unsqueeze(1).repeat(1, n, 1)])[0]


@case(images(5, 3))
class rnn_learned_state(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.h0 = nn.RNN(3, 4, bidirectional=True), nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        output, last = run(self.layer, x.transpose(0, 1), self.h0.expand(2, x.shape[0], 4))
        return torch.cat([output[-1], last[0]], 1)


class Words(nn.Module):
    """A sequence per word: the words of an example are merged into the batch."""

    def __init__(self, layer: nn.RNNBase, examples_vary_fastest: bool) -> None:
        super().__init__()
        self.layer, self.minor = layer, examples_vary_fastest

    def forward(self, x: Tensor) -> Tensor:
        n, words = x.shape[:2]
        y = x.transpose(0, 1).reshape(words * n, 5, 3) if self.minor else x.reshape(n * words, 5, 3)
        h0 = torch.zeros(1, n * words, 4, dtype=x.dtype)
        last = run(self.layer, y.transpose(0, 1), [h0, h0] if self.layer.mode == "LSTM" else h0)[1][0]
        return last.reshape(words, n, 4).transpose(0, 1) if self.minor else last.reshape(n, words, 4)


@case(images(2, 5, 3))
def lstm_on_words() -> nn.Module:
    return Words(nn.LSTM(3, 4), examples_vary_fastest=False)


@case(images(2, 5, 3))
def lstm_on_words_minor() -> nn.Module:
    return Words(nn.LSTM(3, 4), examples_vary_fastest=True)


@case(images(2, 5, 3))
def gru_on_words_minor() -> nn.Module:
    return Words(nn.GRU(3, 4), examples_vary_fastest=True)


@case(images(2, 5, 3))
def rnn_on_words() -> nn.Module:
    return Words(nn.RNN(3, 4), examples_vary_fastest=False)


def _frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


@case(images(5, 3))
def lstm_frozen_hidden_weight() -> nn.Module:
    return _frozen(Whole(nn.LSTM(3, 4, batch_first=True)), "layer.weight_hh_l0", "layer.bias_hh_l0", "head.bias")


@case(images(5, 3))
def lstm_frozen_projection_and_input() -> nn.Module:
    model = Whole(nn.LSTM(3, 4, proj_size=2, batch_first=True))
    return _frozen(model, "layer.weight_hr_l0", "layer.weight_ih_l0", "head.weight", "head.bias")


@case(images(5, 3))
def lstm_only_biases() -> nn.Module:
    return _frozen(Whole(nn.LSTM(3, 4, batch_first=True)), "layer.weight_hh_l0", "layer.weight_ih_l0")


@case(images(5, 3))
def gru_only_input_weight() -> nn.Module:
    names = ("layer.weight_hh_l0", "layer.bias_hh_l0", "layer.bias_ih_l0", "head.weight", "head.bias")
    return _frozen(Whole(nn.GRU(3, 4, batch_first=True)), *names)


@case(images(5, 3))
def rnn_only_hidden_weight() -> nn.Module:
    names = ("layer.weight_ih_l0", "layer.bias_hh_l0", "layer.bias_ih_l0", "head.weight", "head.bias")
    return _frozen(Whole(nn.RNN(3, 4, batch_first=True)), *names)


@case(images(5, 3))
def rnn_only_bias() -> nn.Module:
    names = ("layer.weight_ih_l0", "layer.bias_hh_l0", "layer.weight_hh_l0", "head.weight", "head.bias")
    return _frozen(Whole(nn.RNN(3, 4, batch_first=True)), *names)


@case(images(5, 3))
def gru_all_frozen() -> nn.Module:
    """The layer is no site, and the gradient of the layer before passes through it."""
    names = [f"layer.{name}" for name in nn.GRU(3, 4)._flat_weights_names]
    return _frozen(Whole(nn.GRU(3, 4, batch_first=True)), *names)


@case(images(5, 3))
class lstm_tied(nn.Module):
    """One layer run twice, and one parameter for both biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 3)
        self.layer.bias_hh_l0 = self.layer.bias_ih_l0

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.shape[0], 3, dtype=x.dtype)
        once, h, c = run(self.layer, x.transpose(0, 1), [h0, h0])
        return run(self.layer, once, [h, c])[0].transpose(0, 1)


@case(images(5, 3))
class lstm_normed_weight(nn.Module):
    """Parameter expressions as weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.scale = (nn.Parameter(torch.randn(s)) for s in ((3, 16), (16, 4), (16, 1)))

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.shape[0], 4, dtype=x.dtype)
        weights = [self.w.t(), self.scale * F.normalize(self.u, dim=1)]
        return torch.lstm(x, [h0, h0], weights, False, 1, 0.0, self.training, False, True)[0]


@case(images(5, 3))
class cells_in_a_loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(3, 4), nn.GRUCell(4, 3)
        self.tanh, self.relu = nn.RNNCell(3, 4, bias=False), nn.RNNCell(4, 4, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        g, found = x[:, 0], []
        for t in range(3):
            h, c = torch.lstm_cell(x[:, t], [h, c], *self.weights(self.lstm))
            g = torch.gru_cell(h, g, *self.weights(self.gru))
            r = torch.rnn_tanh_cell(g, h, self.tanh.weight_ih, self.tanh.weight_hh)
            found.append(torch.rnn_relu_cell(r, c, *self.weights(self.relu)))
        return torch.stack([*found, c], 1)

    def weights(self, cell: nn.RNNCellBase) -> tuple[Any, ...]:
        return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
