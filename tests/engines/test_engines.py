"""Every method on every case, against one example at a time in float64: exact, or refused with the layer's name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
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


# What is not as it was, or not what it seems


class Several(nn.Module):
    """Returns values that are computed from one another, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x))
        logits = self.last(hidden)
        return {"logits": logits, "again": logits, "hidden": hidden, "pooled": logits.mean(1), "moved": logits + 1}


def of_several(output: dict[str, Tensor], targets: Tensor) -> Tensor:
    parts = (output["logits"], output["again"].sin(), output["hidden"], output["pooled"][:, None], output["moved"])
    return squares(torch.cat(parts, 1), targets)


@pytest.mark.parametrize("loss", [of_several, lambda output, y: squares(output["logits"], y)])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_outputs_that_are_computed_from_one_another(engine: Engine, loss: Any) -> None:
    torch.manual_seed(0)
    model, x, y = Several().double(), torch.randn(6, 3).double(), torch.randn(6).double()
    gradients = one_at_a_time(model, Batch((x,), y), loss)
    assert_exact(engine(model, loss, x, y, clip_norm=0.5), gradients, 0.5, 1 / 6, engine.name)


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Answers(Several):
    """Returns an object that nobody can take apart."""

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return Answer(found["logits"], found["hidden"])


@pytest.mark.parametrize("engine", [engines.losses, engines.reweight_gp], ids=lambda engine: engine.name)
def test_an_output_that_cannot_be_taken_apart_is_refused(engine: Engine) -> None:
    with pytest.raises(perexfx.ArgumentError, match="The model returns Answer, which holds 2 tensors"):
        engine(Answers(), lambda output, y: squares(output.logits, y), torch.randn(4, 3), torch.randn(4), clip_norm=1.0)


@pytest.mark.parametrize("engine", [engines.chain_rule, engines.reweight_gp], ids=lambda engine: engine.name)
@pytest.mark.parametrize(
    "options", [{"weight": torch.tensor([1.0, 9.0]).double()}, {"ignore_index": 1}, {"reduction": "sum"}]
)
def test_losses_that_join_otherwise_are_refused(engine: Engine, options: dict[str, Any]) -> None:
    model, x, _ = small()
    y = torch.tensor([0, 1, 0, 0, 1, 0])
    with pytest.raises(perexfx.ArgumentError, match="is the mean of what it gives for each example by itself"):
        engine(model, functools.partial(F.cross_entropy, **options), x, y, clip_norm=1.0)


@pytest.mark.parametrize(
    "engine", [engines.copies, engines.chain_rule, engines.reweight_gp], ids=lambda engine: engine.name
)
def test_losses_that_read_parameters_are_refused(engine: Engine) -> None:
    model, x, y = small()
    with pytest.raises(perexfx.ArgumentError, match="it reads parameters itself"):
        engine(model, lambda o, y: squares(o, y) + model.get_parameter("0.weight").sum(), x, y, clip_norm=1.0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0.0] * 6, "a pytree of tensors. Found float in it"),
        (torch.zeros(5).double(), r"Found a tensor with shape \[5\]"),
        (torch.zeros(6, 6).double(), "Found a tensor with their number on both"),
    ],
)
def test_targets_that_cannot_be_told_apart(targets: Any, message: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 6, 3).double()
    with pytest.raises(perexfx.ArgumentError, match=message):
        engines.one_by_one(model, lambda o, _: o.mean(), x, targets, clip_norm=1.0, batch_dim=1)


def changes() -> list[Any]:
    def replace_layer(model: nn.Module) -> None:
        model[1] = nn.ReLU()  # pyright: ignore[reportIndexIssue]

    def replace_parameter(model: nn.Module) -> None:
        model[0].weight = nn.Parameter(torch.zeros(5, 3).double())  # pyright: ignore[reportIndexIssue]

    def freeze(model: nn.Module) -> None:
        model.get_parameter("0.weight").requires_grad_(False)

    def unfreeze(model: nn.Module) -> None:
        model.get_parameter("2.bias").requires_grad_()

    return [replace_layer, replace_parameter, freeze, unfreeze]


@pytest.mark.parametrize("change", changes())
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_a_model_that_was_changed_since_the_first_batch_is_refused(engine: Engine, change: Any) -> None:
    model, x, y = small()
    model.get_parameter("2.bias").requires_grad_(False)
    step = engine.step(model, squares, clip_norm=0.5)
    step(x, y)
    change(model)
    with pytest.raises(perexfx.ModeError, match="was replaced, frozen or unfrozen since the first batch"):
        step(x, y)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.drop(self.layer(x)) * factor


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_numbers_and_modes_are_those_of_each_batch(engine: Engine) -> None:
    torch.manual_seed(0)
    model, x, y = Scaled().double().eval(), torch.randn(6, 3).double(), torch.randn(6).double()
    step = engine.step(model, squares, clip_norm=1e9)
    losses = [float(step(x, y)), float(step(x, y))]
    assert losses[0] == losses[1]
    model.train()
    assert float(step(x, y)) != losses[0]
    model.eval()
    assert float(step(x, y)) == losses[0]
    with pytest.raises(perexfx.ArgumentError, match=r"Argument `factor` was 1\.0"):
        step((x, 2.0), y)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_nothing_of_a_step_is_left_behind(engine: Engine) -> None:
    model, x, y = small()
    step = engine.step(model, squares, clip_norm=0.5)
    step(x, y)
    first = step.result
    assert first is not None
    assert not any(value.requires_grad for value in (first.loss, first.norms, *first.grads.values()))
    kept = {name: gradient.clone() for name, gradient in first.grads.items()}
    step(x, y)
    for name, gradient in first.grads.items():
        torch.testing.assert_close(gradient, kept[name])


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_a_batch_that_fails_leaves_gradients(engine: Engine) -> None:
    model, x, y = small()
    step = engine.step(model, squares, torch.optim.SGD(model.parameters(), lr=0.0), clip_norm=0.5)
    step(x, y)
    before = model.get_parameter("0.weight").grad
    with pytest.raises(perexfx.ArgumentError):
        step((x, x), y)
    assert model.get_parameter("0.weight").grad is before
    with torch.inference_mode():
        step(x, y)
