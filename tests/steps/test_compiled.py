"""Whole steps by every way: what they leave behind is what eager steps leave behind."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import mlp, small_cnn
from perexfx.steps import compiled
from perexfx.steps.compiled import CompiledStep
from tests.support.oracle import assert_close

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes one way wherever it is there, whatever the timings; compiles for that way alone."""

    def use(wanted: str) -> None:
        def choose(_: CompiledStep, ways: Mapping[str, Any], *__: Any) -> str:
            return wanted if wanted in ways else "eager"

        monkeypatch.setattr(CompiledStep, "_fastest", choose)
        if wanted != "compiled":
            monkeypatch.setattr(compiled, "COMPILED_NODES", 0)

    return use


def pair(model: nn.Module, **options: Any) -> tuple[perexfx.Transformed, perexfx.Transformed]:
    return perexfx.transform(model, **options), perexfx.transform(copy.deepcopy(model), **options)


def grads(gm: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in gm.named_parameters() if parameter.grad is not None}


def agree(first: perexfx.Transformed, second: perexfx.Transformed, tolerance: float) -> None:
    assert_close(grads(second), grads(first), tolerance, "gradients")
    a, b = first.perexfx, second.perexfx
    for x, y in ((a.norms, b.norms), (a.clip_factors, b.clip_factors)):
        assert x is not None
        assert y is not None
        assert_close({"": y}, {"": x}, tolerance, "norms and factors")


def test_results_of_a_graph_that_is_replayed_are_copied() -> None:
    memory = torch.zeros(3)

    def replayed(*_: object) -> dict[str, Tensor]:
        return {"weight": memory.add_(1)}

    way = compiled._with_results_of_their_own(replayed)
    first, second = way({}, {}, None, None), way({}, {}, None, None)
    assert torch.equal(first["weight"], torch.ones(3))
    assert torch.equal(second["weight"], 2 * torch.ones(3))


@pytest.mark.parametrize("way", ["eager", "graph", "compiled"])
def test_gradients_accumulate_over_batches_of_several_sizes(way: str, take: Callable[[str], None]) -> None:
    take(way)
    torch.manual_seed(0)
    plain, fast = pair(mlp((6, 5, 10)), clip_norm=0.5)
    step = perexfx.compile_step(fast, F.cross_entropy)
    for n in (4, 4, 3) if way != "compiled" else (4, 4):
        x, y = torch.randn(n, 6), torch.randint(0, 10, (n,))
        expected = F.cross_entropy(plain(x), y)
        expected.backward()
        torch.testing.assert_close(step(x, y), expected.detach())
        agree(plain, fast, 1e-5)
    assert set(step.ways.values()) == {way}


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_training_with_an_optimizer(way: str, take: Callable[[str], None]) -> None:
    take(way)
    torch.manual_seed(0)
    plain, fast = pair(small_cnn().double())
    optimizers = [torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9) for gm in (plain, fast)]
    step = perexfx.compile_step(fast, F.cross_entropy, optimizers[1])
    for _ in range(3):
        x, y = torch.randn(4, 1, 28, 28).double(), torch.randint(0, 10, (4,))
        optimizers[0].zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizers[0].step()
        step(x, y)
    agree(plain, fast, 1e-9)
    assert_close(dict(fast.named_parameters()), dict(plain.named_parameters()), 1e-10, "parameters")


def test_the_fastest_way_is_one_of_all() -> None:
    torch.manual_seed(0)
    gm = perexfx.transform(mlp((6, 5, 10)))
    step = perexfx.compile_step(gm, F.cross_entropy)
    step(torch.randn(4, 6), torch.randint(0, 10, (4,)))
    assert set(step.ways.values()) <= {"eager", "graph", "compiled"}


def test_most_batch_sizes_stay_eager(monkeypatch: pytest.MonkeyPatch, take: Callable[[str], None]) -> None:
    take("graph")
    monkeypatch.setattr(compiled, "KINDS", 2)
    gm = perexfx.transform(mlp((6, 10)))
    step = perexfx.compile_step(gm, F.cross_entropy)
    for n in (1, 2, 3, 4, 1):
        step(torch.randn(n, 6), torch.randint(0, 10, (n,)))
        assert gm.perexfx.norms is not None
        assert gm.perexfx.norms.shape == (n,)
    assert list(step.ways.values()) == ["graph", "graph", "eager", "eager"]


def test_a_way_that_finds_something_else_is_dropped(
    monkeypatch: pytest.MonkeyPatch, take: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    take("graph")
    plain = compiled.traced

    def wrong(*given: Any) -> Any:
        graph = plain(*given)

        def run(*arguments: Any) -> Any:
            loss, norms, factors, gradients = graph(*arguments)
            return loss, norms, factors, {name: value * 1.01 for name, value in gradients.items()}

        run.graph = graph.graph  # pyright: ignore[reportFunctionMemberAccess]
        return run

    monkeypatch.setattr(compiled, "traced", wrong)
    step = perexfx.compile_step(perexfx.transform(mlp((6, 10))), F.cross_entropy)
    with caplog.at_level(logging.WARNING, "perexfx"):
        step(torch.randn(4, 6), torch.randint(0, 10, (4,)))
    assert set(step.ways.values()) == {"eager"}
    assert "0.weight" in caplog.text
    assert "differs" in caplog.text


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    step = perexfx.compile_step(perexfx.transform(mlp((6, 10))), F.cross_entropy)
    with caplog.at_level(logging.WARNING, "perexfx"):
        step(torch.randn(4, 6), torch.randint(0, 10, (4,)))
    assert set(step.ways.values()) <= {"eager", "graph"}
    assert "no compiler here" in caplog.text


def test_a_loss_that_reads_values_stays_eager() -> None:
    torch.manual_seed(0)

    def reads(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets) * (2.0 if bool(targets.sum() > 0) else 1.0)

    plain, fast = pair(mlp((6, 10)))
    step = perexfx.compile_step(fast, reads)
    x, y = torch.randn(4, 6), torch.randint(0, 10, (4,))
    step(x, y)
    reads(plain(x), y).backward()
    agree(plain, fast, 1e-6)
    assert set(step.ways.values()) == {"eager"}


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_random_numbers_are_those_of_an_eager_step(way: str, take: Callable[[str], None]) -> None:
    take(way)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5), nn.Linear(20, 10)).double()
    plain, fast = pair(model)
    step = perexfx.compile_step(fast, F.cross_entropy)
    x, y = torch.randn(4, 6).double(), torch.randint(0, 10, (4,))
    for _ in range(2):
        torch.manual_seed(1)
        F.cross_entropy(plain(x), y).backward()
        torch.manual_seed(1)
        step(x, y)
        agree(plain, fast, 1e-9)
    fast.eval()
    plain.eval()
    F.cross_entropy(plain(x), y).backward()
    step(x, y)
    agree(plain, fast, 1e-9)
    assert len(step.ways) == 2


def test_what_is_not_transformed() -> None:
    with pytest.raises(perexfx.ArgumentError, match="transform"):
        perexfx.compile_step(nn.Linear(2, 2), F.cross_entropy)  # pyright: ignore[reportArgumentType]


class Twice(nn.Module):
    """Two biases with the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("way", ["graph", "compiled"])
def test_every_gradient_has_memory_of_its_own(way: str, take: Callable[[str], None]) -> None:
    take(way)
    torch.manual_seed(0)
    plain, fast = pair(Twice())
    step = perexfx.compile_step(fast, F.cross_entropy)
    x, y = torch.randn(4, 6), torch.randint(0, 10, (4,))
    for _ in range(2):
        F.cross_entropy(plain(x), y).backward()
        step(x, y)
        agree(plain, fast, 1e-5)
    assert set(step.ways.values()) == {way}
    memory = {parameter.grad.untyped_storage().data_ptr() for parameter in fast.parameters()}  # pyright: ignore[reportOptionalMemberAccess]
    assert len(memory) == 4


def test_what_is_frozen_later_gets_no_gradient(take: Callable[[str], None]) -> None:
    take("graph")
    torch.manual_seed(0)
    plain, fast = pair(mlp((6, 5, 10)))
    step = perexfx.compile_step(fast, F.cross_entropy)
    x, y = torch.randn(4, 6), torch.randint(0, 10, (4,))
    step(x, y)
    for gm in (plain, fast):
        gm.zero_grad()
        gm.get_parameter("0.weight").requires_grad_(False)
    step(x, y)
    F.cross_entropy(plain(x), y).backward()
    agree(plain, fast, 1e-5)
    assert fast.get_parameter("0.weight").grad is None
    assert list(step.ways.values()) == ["graph", "graph"]


def test_autocast_is_refused_as_in_an_eager_step(take: Callable[[str], None]) -> None:
    take("graph")
    step = perexfx.compile_step(perexfx.transform(mlp((6, 10))), F.cross_entropy)
    x, y = torch.randn(4, 6), torch.randint(0, 10, (4,))
    step(x, y)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(perexfx.ModeError, match="Autocast"):
        step(x, y)
