"""The kernel of LSTMs: against one example at a time in float64."""

from __future__ import annotations

from ctypes import CDLL

import pytest
import torch
from torch import Tensor, nn

import perexfx
from tests.support.cases_recurrent import Whole
from tests.support.losses import squares
from tests.support.marks import needs_kernels
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


class FromState(nn.Module):
    """Initial states from the input; the last ones among the results."""

    def __init__(self, hidden: int, bidirectional: bool) -> None:
        super().__init__()
        self.directions = 2 if bidirectional else 1
        self.state = nn.Linear(3, hidden)
        self.lstm = nn.LSTM(3, hidden, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state(x[:, 0]).repeat(self.directions, 1, 1)
        output, (h, c) = self.lstm(x, (state, state.tanh()))
        return torch.cat([output.mean(1), *(last.transpose(0, 1).flatten(1) for last in (h, c))], 1)


@pytest.mark.parametrize(("hidden", "examples", "steps"), [(16, 1, 1), (16, 9, 5), (32, 7, 4), (48, 16, 6), (80, 3, 2)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_an_lstm(
    bidirectional: bool, hidden: int, examples: int, steps: int, threads: int, level: CDLL, calls: list[str]
) -> None:
    torch.manual_seed(0)
    model = FromState(hidden, bidirectional)
    batch = Batch((torch.randn(examples, steps, 3),), torch.randn(examples))
    gm = perexfx.transform(model, clip_norm=0.5)
    found = train_step(gm, batch, squares)
    assert "lstm_steps_back" in calls
    assert gm.perexfx.norms is not None
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = norms_of(gradients)
    assert_close({"norms": gm.perexfx.norms.double()}, {"norms": expected}, 1e-5, "norms")
    factors = (0.5 / expected).clamp(max=1) / examples
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "sums")


@needs_kernels
@pytest.mark.parametrize("bias", [-200.0, -60.0, -20.0, 200.0])
@pytest.mark.parametrize("gate", range(4))
def test_gates_at_their_ends(gate: int, bias: float, calls: list[str]) -> None:
    """The kernel divides the output by the output gate, which may be zero."""
    torch.manual_seed(0)
    model = FromState(16, bidirectional=False)
    with torch.no_grad():
        model.lstm.bias_ih_l0.unflatten(0, (4, -1))[gate] += bias
    batch = Batch((torch.randn(9, 5, 3),), torch.randn(9))
    gm = perexfx.transform(model, clip_norm=None)
    found = train_step(gm, batch, squares)
    assert "lstm_steps_back" in calls
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = weighted(gradients, torch.ones(9, dtype=torch.float64) / 9)
    assert_close({k: v.double() for k, v in found.items()}, expected, 1e-5, "sums")


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.LSTM(3, 24, batch_first=True), torch.float32),  # hidden size
        (nn.LSTM(3, 16, batch_first=True, proj_size=5), torch.float32),
        (nn.LSTM(3, 16, batch_first=True), torch.float64),
        (nn.GRU(3, 16, batch_first=True), torch.float32),
    ],
)
def test_what_the_lstm_kernel_is_not_for(
    layer: nn.Module, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Whole(layer).to(dtype)
    batch = Batch((torch.randn(4, 5, 3, dtype=dtype),), torch.randn(4, dtype=dtype))
    found = train_step(perexfx.transform(model), batch, squares)
    assert "lstm_steps_back" not in calls
    monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    expected = train_step(perexfx.transform(model), batch, squares)
    assert_close(found, expected, 1e-6, "gradients")


@needs_kernels
def test_an_example_that_is_not_finite(calls: list[str]) -> None:
    torch.manual_seed(0)
    model = FromState(16, bidirectional=False)
    x = torch.randn(9, 5, 3)
    x[0, 2, 1] = torch.nan
    batch = Batch((x,), torch.randn(9))
    others = Batch((x[1:],), batch.targets[1:])
    gm = perexfx.transform(model, clip_norm=0.5)
    found = train_step(gm, batch, squares)
    expected = train_step(gm, others, squares)
    assert "lstm_steps_back" in calls
    assert_close(found, {name: value * 8 / 9 for name, value in expected.items()}, 1e-5, "all but that example")
