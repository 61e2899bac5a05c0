"""Every method on every case, against one example at a time in float64: exact, or refused with the layer's name."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx import engines
from perexfx.engines import ENGINES, Engine, StepResult
from perexfx.engines.chain_rule import FORMULAS
from tests.support.cases import BY_NAME, CASES, squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted

TOLERANCE = 1e-9


@functools.cache
def truth(name: str) -> tuple[nn.Module, Batch, dict[str, Tensor]]:
    case = BY_NAME[name]
    model, batch = case.build(), case.batch()
    return model, batch, one_at_a_time(model, batch, case.loss)


def assert_exact(found: StepResult, gradients: dict[str, Tensor], clip_norm: float, share: float, name: str) -> None:
    norms = norms_of(gradients)
    factors = (clip_norm / norms).clamp(max=1)
    assert_close({"norms": found.norms}, {"norms": norms}, TOLERANCE, name)
    assert_close(found.grads, weighted(gradients, factors * share), TOLERANCE, name)


def has_expressions(model: nn.Module, batch: Batch, batch_dim: int) -> bool:
    sites = perexfx.transform(model, batch.inputs, batch_dim=batch_dim).perexfx.sites
    return any(operand.expression.function is not None for site in sites for operand in site.operands)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_every_case_is_exact_or_refused(engine: Engine, name: str) -> None:
    case, (model, batch, gradients) = BY_NAME[name], truth(name)
    clip_norm = float(norms_of(gradients).median())
    call = functools.partial(engine, model, case.loss, batch.inputs, batch.targets, batch_dim=case.batch_dim)
    kinds = {site.kind for site in perexfx.transform(model, batch.inputs, batch_dim=case.batch_dim).perexfx.sites}
    if engine is engines.chain_rule and not kinds <= FORMULAS.keys():
        with pytest.raises(perexfx.RefusedError, match=r"`chain_rule` cannot treat `.*the method has no formula"):
            call(clip_norm=clip_norm)
        return
    if engine is engines.chain_rule and has_expressions(model, batch, case.batch_dim):
        with pytest.raises(perexfx.RefusedError, match="is computed from parameters"):
            call(clip_norm=clip_norm)
        return
    found = call(clip_norm=clip_norm)
    assert_exact(found, gradients, clip_norm, 1 / batch.size, name)
    assert all(parameter.grad is None for parameter in model.parameters())


def convolutional(rank: int) -> nn.Module:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    return nn.Sequential(
        convolution(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        convolution(6, 4, 2, padding="same", bias=False),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_convolutions_of_every_rank(engine: Engine, reduction: str, rank: int) -> None:
    torch.manual_seed(0)
    model, x, y = convolutional(rank), torch.randn(4, 4, *[9, 7, 5][:rank]).double(), torch.tensor([0, 2, 1, 1])
    model.double()(x)
    gradients = one_at_a_time(model, Batch((x,), y), F.cross_entropy)
    clip_norm = float(norms_of(gradients).median())

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, reduction=reduction)

    found = engine(model, loss_fn, x, y, clip_norm=clip_norm, loss_reduction=reduction)
    assert_exact(found, gradients, clip_norm, 1 / 4 if reduction == "mean" else 1.0, engine.name)
    torch.testing.assert_close(found.loss, loss_fn(model(x), y).detach())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
@pytest.mark.parametrize(
    "engine", [engines.one_by_one, engines.losses, engines.copies, engines.reweight_gp], ids=lambda engine: engine.name
)
def test_recurrent_layers(engine: Engine, kind: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Recurrent(kind).double(), torch.randn(4, 7, 5).double(), torch.tensor([0, 2, 1, 1])
    gradients = one_at_a_time(model, Batch((x,), y), F.cross_entropy)
    clip_norm = float(norms_of(gradients).median())
    assert_exact(engine(model, F.cross_entropy, x, y, clip_norm=clip_norm), gradients, clip_norm, 1 / 4, engine.name)


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, torch.randn(6, 3).double(), torch.randn(6).double()


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
class TestEachMethod:
    def test_steps_train_as_ours_do(self, engine: Engine) -> None:
        model, x, y = small()
        step = engine.step(model, squares, torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=0.5)
        ours = small()[0]
        gm, optimizer = perexfx.transform(ours, clip_norm=0.5), torch.optim.SGD(ours.parameters(), lr=0.1)
        for n in (6, 3, 1, 6):  # as Poisson sampling makes them
            loss = step(x[:n], y[:n])
            torch.testing.assert_close(loss, squares(gm(x[:n]), y[:n]).detach())
            train_step(gm, Batch((x[:n],), y[:n]), squares)
            optimizer.step()
            assert step.result is not None
            torch.testing.assert_close(step.result.norms, gm.perexfx.norms, rtol=1e-9, atol=0.0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, ours.get_parameter(name), rtol=1e-9, atol=1e-12)

    def test_gradients_accumulate_without_an_optimizer(self, engine: Engine) -> None:
        model, x, y = small()
        step = engine.step(model, squares, clip_norm=0.5)
        step(x, y)
        once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        step(x, y)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, 2 * once[name])

    def test_a_batch_without_examples(self, engine: Engine) -> None:
        model, x, y = small()
        found = engine(model, squares, x[:0], y[:0], clip_norm=0.5)
        assert found.norms.shape == (0,)
        assert all(not gradient.any() for gradient in found.grads.values())

    def test_an_example_that_is_not_finite_counts_as_zero(self, engine: Engine) -> None:
        model, x, y = small()
        x[2, 1] = float("inf")
        found = engine(model, squares, x, y, clip_norm=0.5, loss_reduction="mean")
        kept = [0, 1, 3, 4, 5]
        alone = engine(model, squares, x[kept], y[kept], clip_norm=0.5)
        assert not torch.isfinite(found.norms[2])
        assert_close(found.grads, {n: g * 5 / 6 for n, g in alone.grads.items()}, TOLERANCE, engine.name)

    def test_frozen_parameters_do_not_count(self, engine: Engine) -> None:
        model, x, y = small()
        model.get_parameter("0.weight").requires_grad_(False)
        gradients = one_at_a_time(model, Batch((x,), y), squares)
        assert "0.weight" not in gradients
        assert_exact(engine(model, squares, x, y, clip_norm=0.5), gradients, 0.5, 1 / 6, engine.name)

    def test_what_mixes_examples_is_refused(self, engine: Engine) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        with pytest.raises(perexfx.MixingError, match="module `1`"):
            engine(model, squares, torch.randn(4, 3), torch.randn(4), clip_norm=1.0)

    def test_mistakes(self, engine: Engine) -> None:
        model, x, y = small()
        for options, message in (
            ({"clip_norm": 0}, "`clip_norm` should be a positive number"),
            ({"clip_norm": None}, "`clip_norm` should be a positive number"),
            ({"clip_norm": 1.0, "loss_reduction": "none"}, "`loss_reduction` should be"),
        ):
            with pytest.raises(perexfx.ArgumentError, match=message):
                engine(model, squares, x, y, **options)
        with pytest.raises(perexfx.ArgumentError, match="`loss_fn` should be a function"):
            engine(model, "mse", x, y, clip_norm=1.0)  # pyright: ignore[reportArgumentType]
        with pytest.raises(perexfx.ArgumentError, match="`loss_fn` should return a scalar"):
            engine(model, lambda output, _: output, x, y, clip_norm=1.0)
        with pytest.raises(perexfx.ArgumentError, match="does not fit"):
            engine(model, squares, (x, x), y, clip_norm=1.0)

    def test_it_has_the_papers_names(self, engine: Engine) -> None:
        assert "et al." in engine.also or "Lee & Kifer" in engine.also
        assert engine.__doc__
        assert "References" in engine.__doc__
        assert getattr(engines, engine.name) is engine
