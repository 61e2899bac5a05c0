"""Kernels in C++: against the Python code in their place, and against one example at a time in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from cases_recurrent import Whole
from oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted
from torch import Tensor, nn

import perexfx
from perexfx.ir import native
from perexfx.ir.factors import Product, SharedGram
from perexfx.ir.native import using_kernels
from perexfx.strategies.gram import Gram

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 5, 7), (2, 8, 16), (4, 17, 33), (3, 31, 130), (5, 64, 300), (1, 40, 257)]
)
def test_gram_matrices(sizes: tuple[int, int, int], threads: int) -> None:
    torch.manual_seed(0)
    n, t, size = sizes
    for rows in (
        torch.randn(n, t, size),
        torch.randn(t, n, size).transpose(0, 1),
        torch.randn(n, t, size + 3)[..., 1:-2],
    ):
        with using_kernels() as ran:
            found = native.gram(rows)
        assert found is not None
        assert ran == {"gram"}
        exact = rows.double() @ rows.double().transpose(1, 2)
        torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=1e-6 * float(exact.abs().max()))
        assert torch.equal(found, found.transpose(1, 2))


@pytest.mark.parametrize(("i", "o"), [(5000, 12), (12, 5000), (12, 20), (5000, 4200)])
@pytest.mark.parametrize("t", [7, 64, 65])
def test_norms_where_a_kernel_makes_one_gram_matrix_and_not_the_other(t: int, i: int, o: int) -> None:
    torch.manual_seed(0)
    left, others, right = torch.randn(3, 1, t, i), torch.randn(3, 1, t, 5), torch.randn(3, 1, t, o)
    shared = SharedGram(2)
    for factor in (left, others):
        product = Product(factor, right, (o, factor.shape[3]), right_gram=shared)
        with using_kernels():
            found, _ = Gram().squared_norms(product)
        exact = torch.einsum("ngti,ngto->noi", factor.double(), right.double()).flatten(1).square().sum(1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0.0)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output.flatten(1).sum(1) - targets).square().mean()


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
def test_an_lstm(bidirectional: bool, hidden: int, examples: int, steps: int, threads: int) -> None:
    torch.manual_seed(0)
    model = FromState(hidden, bidirectional)
    batch = Batch((torch.randn(examples, steps, 3),), torch.randn(examples))
    gm = perexfx.transform(model, clip_norm=0.5)
    with using_kernels() as ran:
        found = train_step(gm, batch, squares)
    assert "lstm" in ran
    assert gm.perexfx.norms is not None
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = norms_of(gradients)
    assert_close({"norms": gm.perexfx.norms.double()}, {"norms": expected}, 1e-5, "norms")
    factors = (0.5 / expected).clamp(max=1) / examples
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "sums")


@pytest.mark.parametrize("bias", [-200.0, -60.0, -20.0, 200.0])
@pytest.mark.parametrize("gate", range(4))
def test_gates_at_their_ends(gate: int, bias: float) -> None:
    """The kernel divides the output by the output gate, which may be zero."""
    torch.manual_seed(0)
    model = FromState(16, bidirectional=False)
    with torch.no_grad():
        model.lstm.bias_ih_l0.unflatten(0, (4, -1))[gate] += bias
    batch = Batch((torch.randn(9, 5, 3),), torch.randn(9))
    gm = perexfx.transform(model, clip_norm=None)
    with using_kernels() as ran:
        found = train_step(gm, batch, squares)
    assert "lstm" in ran
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
def test_what_the_lstm_kernel_is_not_for(layer: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Whole(layer).to(dtype)
    batch = Batch((torch.randn(4, 5, 3, dtype=dtype),), torch.randn(4, dtype=dtype))
    expected = train_step(perexfx.transform(model), batch, squares)
    with using_kernels() as ran:
        found = train_step(perexfx.transform(model), batch, squares)
    assert "lstm" not in ran
    assert_close(found, expected, 1e-6, "gradients")


def test_nothing_runs_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", pytest.fail)
    assert native.gram(torch.randn(2, 3, 4)) is None
    model = Whole(nn.LSTM(3, 16, batch_first=True))
    train_step(perexfx.transform(model), Batch((torch.randn(4, 5, 3),), torch.randn(4)), squares)


def test_an_example_that_is_not_finite() -> None:
    torch.manual_seed(0)
    model = FromState(16, bidirectional=False)
    x = torch.randn(9, 5, 3)
    x[0, 2, 1] = torch.nan
    batch = Batch((x,), torch.randn(9))
    others = Batch((x[1:],), batch.targets[1:])
    gm = perexfx.transform(model, clip_norm=0.5)
    with using_kernels() as ran:
        found = train_step(gm, batch, squares)
        expected = train_step(gm, others, squares)
    assert "lstm" in ran
    assert_close(found, {name: value * 8 / 9 for name, value in expected.items()}, 1e-5, "all but that example")


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    native._library.cache_clear()
    monkeypatch.setattr(CppCodeCache, "load", fails)
    with caplog.at_level(logging.WARNING, "perexfx"), using_kernels() as ran:
        assert native.gram(torch.randn(2, 3, 4)) is None
        assert native.gram(torch.randn(2, 3, 4)) is None
    native._library.cache_clear()
    assert not ran
    assert caplog.text.count("no compiler here") == 1
