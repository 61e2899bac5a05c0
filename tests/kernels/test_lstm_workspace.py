"""The gates of torch's fused LSTM, read from its workspace: float32 against one example at a time in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.ir.recurrent import lstm_layer
from perexfx.kernels import lstm_workspace
from perexfx.kernels.lstm_workspace import gates_in, has_gates, lstm_with_workspace
from tests.support.cases_recurrent import Whole
from tests.support.losses import squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted

SIZES = [(5, 2, 3, 4), (3, 4, 5, 6), (7, 5, 16, 24), (1, 3, 8, 8), (9, 1, 4, 64), (6, 16, 32, 128), (4, 3, 300, 100)]
has_onednn = torch.backends.mkldnn.is_available()


def given(steps: int, examples: int, features: int, hidden: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(steps, examples, features), (examples, hidden), (examples, hidden), (4 * hidden, features)]
    return [torch.randn(*shape) for shape in (*shapes, (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))]


@pytest.mark.skipif(not has_onednn, reason="this build of torch has no oneDNN, whose workspace it is")
@pytest.mark.parametrize("sizes", SIZES)
def test_the_gates_are_found(sizes: tuple[int, int, int, int]) -> None:
    x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh = given(*sizes)
    assert has_gates(x, weight_hh)
    output, *_, found = lstm_with_workspace(x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    gates = x @ weight_ih.t() + torch.cat([h0[None], output[:-1]]) @ weight_hh.t() + bias_ih + bias_hh
    read = gates_in(found, x, sizes[3])
    assert read is not None
    for at, activation in enumerate((torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid)):
        own, expected = read.unflatten(2, (4, -1))[:, :, at], activation(gates.unflatten(2, (4, -1))[:, :, at])
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not has_onednn, reason="this build of torch has no oneDNN, whose workspace it is")
def test_memory_that_is_not_contiguous() -> None:
    """The operation itself reads it as if it were."""
    arguments = given(5, 2, 3, 4)
    others = [value.t().contiguous().t() if value.dim() == 2 else value for value in arguments]
    others[0] = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    expected = lstm_layer(*arguments)
    for found, own in zip(lstm_with_workspace(*others), expected, strict=False):
        torch.testing.assert_close(found, own)


def test_what_has_no_workspace() -> None:
    x, _, _, _, weight, _, _ = given(5, 2, 3, 4)
    assert not has_gates(x.double(), weight.double())
    assert not has_gates(x[:, :0], weight)
    torch._C._set_mkldnn_enabled(False)  # the context manager warns of TF32
    try:
        assert not has_gates(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_float32_norms_and_sums(batch_first: bool, bidirectional: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = Whole(nn.LSTM(3, 24, 2, batch_first=batch_first, bidirectional=bidirectional, bias=bias))
    x = torch.randn(4, 6, 3)
    gm = perexfx.transform(model, clip_norm=0.5, batch_dim=0 if batch_first else 1)
    x = x if batch_first else x.transpose(0, 1)
    targets = torch.randn(4)
    found = train_step(gm, Batch((x,), targets, batch_dim=0 if batch_first else 1), squares)
    norms = gm.perexfx.norms
    batch = Batch((x,), targets, batch_dim=0 if batch_first else 1)
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = norms_of(gradients)
    assert_close({"norms": norms.double()}, {"norms": expected}, 1e-5, "norms")
    factors = (0.5 / expected).clamp(max=1) / 4
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "sums")


@pytest.mark.parametrize("stride", [None, 33])
def test_where_no_gates_are_found_they_are_computed(stride: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """33: where they are looked for in the wrong place."""
    torch.manual_seed(0)
    model = Whole(nn.LSTM(3, 8, batch_first=True))
    batch = Batch((torch.randn(4, 6, 3),), torch.randn(4))
    expected = train_step(perexfx.transform(model), batch, squares)
    monkeypatch.setattr(lstm_workspace, "_row_stride", lambda *_: stride)
    found = train_step(perexfx.transform(model), batch, squares)
    assert_close(found, expected, 1e-5, "computed gates")


@pytest.mark.skipif(not has_onednn, reason="this build of torch has no oneDNN, whose workspace it is")
def test_the_trial_is_in_float32_on_the_cpu_whatever_the_defaults_are() -> None:
    x, weight = torch.randn(5, 3, 11), torch.randn(4 * 7, 7)
    lstm_workspace._row_stride.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert has_gates(x, weight)
    finally:
        torch.set_default_dtype(torch.float32)
