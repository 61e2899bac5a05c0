"""Recurrent operations become layers when they are lowered, or are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import perexfx
from perexfx.capture.lower_recurrent import lower_recurrent
from tests.support.cases_recurrent import run


def test_layers_that_run_over_the_examples_are_refused() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h0 = torch.zeros(1, x.shape[1], 4)
            return run(self.layer, x, [h0, h0])[0]

    with pytest.raises(perexfx.MixingError, match=r"`lstm_layer_0`.*it runs along the example axis"):
        perexfx.transform(Crossed(), torch.randn(2, 5, 3))


def test_packed_sequences_are_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4)

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            h0 = torch.zeros(1, 2, 4)
            weights = [getattr(self.layer, name) for name in self.layer._flat_weights_names]
            return torch.gru(data, batch_sizes, h0, weights, True, 1, 0.0, False, False)[0]

    with pytest.raises(perexfx.CaptureError, match=r"`gru` \(test_lower_recurrent.py:\d+\) runs on a packed sequence"):
        perexfx.transform(Packed())


def test_options_that_the_forward_computes_are_refused() -> None:
    graph = fx.Graph()
    x, h0, w, u, rate = (graph.placeholder(name) for name in ("x", "h0", "w", "u", "rate"))
    graph.output(graph.call_function(torch.gru, (x, h0, [w, u], False, 1, rate, False, False, False)))
    with pytest.raises(perexfx.CaptureError, match="`gru` has a `dropout` that the forward computes"):
        lower_recurrent(graph)


def test_exported_operations_are_lowered() -> None:
    graph = fx.Graph()
    x, h0, w, u = (graph.placeholder(name) for name in ("x", "h0", "w", "u"))
    arguments = (x, h0, [w, u], False, 1, 0.0, False, False, False)
    graph.output(graph.call_function(torch.ops.aten.gru.input, arguments))
    lower_recurrent(graph)
    module = fx.GraphModule(nn.Module(), graph)
    given = torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(12, 3), torch.randn(12, 4)
    expected = torch.gru(given[0], given[1], list(given[2:]), False, 1, 0.0, False, False, False)
    torch.testing.assert_close(module(*given), expected)
