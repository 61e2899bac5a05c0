"""Recurrent layers: torch's fused kernels stay, one node per layer and direction."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import perexfx
from perexfx.analysis.fake_run import record
from perexfx.ir.inputs import Inputs
from perexfx.ir.recurrent import gru_layer, lstm_layer, rnn_layer
from perexfx.kernels import gemm
from perexfx.runtime.face import runtime_of
from tests.support.cases_recurrent import Whole, run
from tests.support.losses import squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


class Calls(TorchDispatchMode):
    """Counts the calls below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_the_forward_runs_the_fused_kernel() -> None:
    model = Whole(nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True))
    gm = perexfx.transform(model)
    counts = []
    for steps in (4, 40):
        gm(torch.randn(2, steps, 3))  # the plan is made
        with Calls() as calls:
            gm(torch.randn(2, steps, 3))
        counts.append(len(calls.names))
        assert calls.names.count("aten::mkldnn_rnn_layer") == 4
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_analysis_sees_one_operation_per_layer_and_direction(kind: type[nn.RNNBase]) -> None:
    gm = perexfx.transform(Whole(kind(3, 4, 2, bidirectional=True, batch_first=True)))
    counts = []
    for steps in (4, 400):
        inputs, _ = Inputs.of({"x": torch.randn(2, steps, 3)}, 0)
        names = [call.func._schema.name for call in record(runtime_of(gm).captured.graph, gm, inputs, 0, 3).calls]
        assert names.count("perexfx::recurrent_layer") == 4
        counts.append(len(names))
    assert counts[0] == counts[1]


def test_nodes_have_readable_names_and_places() -> None:
    gm = perexfx.transform(Whole(nn.GRU(3, 4, 2, bidirectional=True)), batch_dim=1)
    names = [node.name for node in runtime_of(gm).captured.graph.nodes]
    assert [name for name in names if "layer_" in name and "gru" in name] == [
        "gru_layer_0",
        "gru_layer_0_reverse",
        "gru_layer_1",
        "gru_layer_1_reverse",
    ]
    assert "zeros" not in names  # zeros at the start are known as such
    sites = [site for site in gm.perexfx.sites if site.kind == "gru"]
    assert [site.place.node for site in sites] == [name for name in names if name.startswith("gru_layer")]
    assert all("cases_recurrent.py:" in site.place.source for site in sites)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_are_torchs_own(kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    layer = kind(3, 4, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    function = {nn.LSTM: lstm_layer, nn.GRU: gru_layer, nn.RNN: rnn_layer}[kind]
    states = (None, None) if kind is nn.LSTM else (None,)
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    expected, last = layer(x)
    last = last[0] if kind is nn.LSTM else last
    for reverse in (False, True):
        output, h_n, *_ = function(x, *states, *weights[4 * reverse : 4 * reverse + 4], reverse=reverse)
        tolerance = 1e-6 if dtype is torch.float32 else 1e-14
        torch.testing.assert_close(output, expected[:, :, 4 * reverse : 4 * reverse + 4], rtol=0, atol=tolerance)
        torch.testing.assert_close(h_n, last[int(reverse)], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_pass_through_layers_that_are_no_site(kind: type[nn.RNNBase]) -> None:
    """A frozen layer is torch's own operation, with autograd as usual; so is one whose gradients are switched off."""
    model = Whole(kind(3, 4, 2, batch_first=True).double()).double()
    batch = Batch((torch.randn(4, 5, 3).double(),), torch.randn(4).double())
    gm = perexfx.transform(model, clip_norm=None)
    model.layer.requires_grad_(False)
    expected = train_step(model, batch, squares)
    assert_close(train_step(gm, batch, squares), expected, 1e-9, "switched off")
    assert_close(train_step(perexfx.transform(model, clip_norm=None), batch, squares), expected, 1e-9, "frozen")
    x = batch.inputs[0].clone().requires_grad_()
    squares(perexfx.transform(model)(x), batch.targets).backward()
    ours, x.grad = x.grad, None
    squares(model(x), batch.targets).backward()
    assert_close({"x": ours}, {"x": x.grad}, 1e-9, "input")


def test_copies_and_saves() -> None:
    gm = perexfx.transform(Whole(nn.LSTM(3, 4, batch_first=True)))
    x = torch.randn(2, 5, 3)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(gm), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), gm(x))
        with torch.no_grad():
            assert torch.equal(other(x), gm(x))


def test_dropout_between_layers_is_the_models() -> None:
    model = Whole(nn.LSTM(3, 4, 3, batch_first=True, dropout=0.5))
    gm = perexfx.transform(model)
    x = torch.randn(2, 5, 3)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(gm(x), expected)


def test_float32_products_through_onednn() -> None:
    """Sizes at which products go to oneDNN."""
    torch.manual_seed(0)
    model = Whole(nn.Sequential(nn.GRU(64, 128, batch_first=True))[0])
    model.head = nn.Linear(3, 64)
    batch = Batch((torch.randn(48, 6, 3),), torch.randn(48))
    assert gemm.SMALL <= 2 * 48 * 128 * 384
    gm = perexfx.transform(model, clip_norm=0.5)
    found, norms = train_step(gm, batch, squares), gm.perexfx.norms
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = norms_of(gradients)
    assert_close({"norms": norms.double()}, {"norms": expected}, 1e-5, "norms")
    factors = (0.5 / expected).clamp(max=1) / 48
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "sums")


@pytest.mark.parametrize("bias", [True, False])
def test_gemm_is_linear(bias: bool) -> None:
    x, weight = torch.randn(100, 64), torch.randn(512, 64)
    shift = torch.randn(512) if bias else None
    with torch.no_grad():
        torch.testing.assert_close(gemm.linear(x, weight, shift), nn.functional.linear(x, weight, shift))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_an_infinite_example_counts_as_zero(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Whole(kind(3, 4, batch_first=True)).double()
    gm = perexfx.transform(model, loss_reduction="sum")
    x, targets = torch.randn(3, 5, 3).double(), torch.randn(3).double()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return squares(output, targets) * len(targets)

    broken = x.clone()
    broken[1, 2] = float("nan")
    found = train_step(gm, Batch((broken,), targets), loss)
    assert gm.perexfx.clip_factors[1] == 0
    kept = torch.tensor([0, 2])
    assert_close(found, train_step(gm, Batch((x,), targets).take(kept), loss), 1e-9, "the others")


def test_a_state_that_is_written_is_not_zeros() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.first = nn.GRU(3, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h0 = torch.zeros(1, x.shape[1], 4, dtype=x.dtype)
            h0.add_(0.5)
            return run(self.layer, self.first(x)[:, :, :3], h0)[0].transpose(0, 1)

    model = Written().double()
    batch = Batch((torch.randn(5, 3, 3).double(),), torch.randn(3).double(), 1)
    gm = perexfx.transform(model, clip_norm=None, batch_dim=1)
    torch.testing.assert_close(gm(*batch.inputs), model(*batch.inputs), rtol=1e-12, atol=1e-12)
    assert_close(train_step(gm, batch, squares), train_step(model, batch, squares), 1e-9, "written")
