"""What a transformed module promises to an unchanged training loop."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from tests.support.cases import BY_NAME, squares
from tests.support.net import build
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


def test_same_parameters_and_state_dict() -> None:
    model, _ = build()
    gm = perexfx.transform(model)
    assert isinstance(gm, torch.fx.GraphModule)
    assert list(gm.state_dict()) == list(model.state_dict())
    ours, theirs = dict(gm.named_parameters()), dict(model.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in theirs)
    assert [name for name, _ in gm.named_buffers()] == [name for name, _ in model.named_buffers()]
    gm.load_state_dict(model.state_dict())


def test_the_model_is_left_as_it_was() -> None:
    model, batch = build()
    before = set(vars(model)), [(n, m.training) for n, m in model.named_modules()], model(*batch.inputs)
    perexfx.transform(model, batch.inputs)
    assert (set(vars(model)), [(n, m.training) for n, m in model.named_modules()]) == before[:2]
    assert torch.equal(model(*batch.inputs), before[2])


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_of_the_original_trains_the_transformed(optimizer_class: Any) -> None:
    model, batch = build()
    reference = copy.deepcopy(model)
    ours, theirs = optimizer_class(model.parameters(), lr=0.1), optimizer_class(reference.parameters(), lr=0.1)
    gm = perexfx.transform(model, clip_norm=0.5)
    for _ in range(3):
        ours.zero_grad()
        squares(gm(*batch.inputs), batch.targets).backward()
        ours.step()
        gradients = one_at_a_time(reference, batch, squares)
        factors = (0.5 / norms_of(gradients)).clamp(max=1) / batch.size
        for name, parameter in reference.named_parameters():
            parameter.grad = None if name.startswith("spare") else weighted(gradients, factors)[name]
        theirs.step()
    assert_close(dict(model.named_parameters()), dict(reference.named_parameters()), 1e-9, "trained")


def test_unused_parameters_keep_no_gradient() -> None:
    model, batch = build()
    squares(perexfx.transform(model)(*batch.inputs), batch.targets).backward()
    assert model.spare.weight.grad is None
    assert model.head.weight.grad is not None


def test_a_parameter_that_the_loss_does_not_reach_keeps_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = Two().double()
    gm = perexfx.transform(model)
    x, y = torch.randn(4, 3).double(), torch.randn(4).double()
    squares(gm(x)[0], y).backward()
    assert model.b.weight.grad is None
    gradients = one_at_a_time(model, Batch((x,), y), lambda out, t: squares(out[0], t))
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms_of(gradients)}, 1e-9, "norms")


def test_gradients_accumulate_and_parameter_hooks_run() -> None:
    model, batch = build()
    gm = perexfx.transform(model)
    seen: list[Tensor] = []
    handle = model.head.weight.register_hook(lambda g: seen.append(g.clone()))
    once = train_step(gm, batch, squares)
    squares(gm(*batch.inputs), batch.targets).backward()
    handle.remove()
    twice = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_close(twice, {name: 2 * g for name, g in once.items()}, 1e-12, "accumulated")
    assert len(seen) == 2
    assert torch.equal(seen[0], once["head.weight"])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduction(reduction: str) -> None:
    model, batch = build()
    gradients = one_at_a_time(model, batch, squares)
    norms = norms_of(gradients)
    clip_norm = float(norms.median())

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return squares(output, targets) * (len(targets) if reduction == "sum" else 1)

    gm = perexfx.transform(model, clip_norm=clip_norm, loss_reduction=reduction)
    found = train_step(gm, batch, loss)
    factors = (clip_norm / norms).clamp(max=1) / (1 if reduction == "sum" else batch.size)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    assert_close(found, weighted(gradients, factors), 1e-9, reduction)


def test_automatic_clipping() -> None:
    model, batch = build()
    gradients = one_at_a_time(model, batch, squares)
    factors = 0.7 / (norms_of(gradients) + 0.01)
    gm = perexfx.transform(model, clip_norm=0.7, clipping="automatic")
    assert_close(train_step(gm, batch, squares), weighted(gradients, factors / batch.size), 1e-9, "automatic")
    assert_close({"f": gm.perexfx.clip_factors}, {"f": factors}, 1e-9, "factors")


def test_per_layer_clipping() -> None:
    model, batch = build()
    gradients = one_at_a_time(model, batch, squares)
    clip_norm = float(norms_of(gradients).median())
    gm = perexfx.transform(model, clip_norm=clip_norm, clipping="per_layer")
    found = train_step(gm, batch, squares)
    layers = ["features.0", "features.1", "head"]
    expected, rows = {}, []
    for layer in layers:
        own = {name: g for name, g in gradients.items() if name.startswith(layer)}
        rows.append((clip_norm / len(layers) ** 0.5 / norms_of(own)).clamp(max=1))
        expected |= weighted(own, rows[-1] / batch.size)
    used = {name: found[name] for name in expected}
    assert_close(used, expected, 1e-9, "per layer")
    assert_close({"f": gm.perexfx.clip_factors}, {"f": torch.stack(rows)}, 1e-9, "factors")
    assert_close({"n": gm.perexfx.norms}, {"n": norms_of(gradients)}, 1e-9, "norms are of everything together")


def test_clipping_by_a_function() -> None:
    model, batch = build()
    gradients = one_at_a_time(model, batch, squares)
    weights = torch.arange(6.0).double()
    gm = perexfx.transform(model, clipping=lambda norms: weights)
    assert_close(train_step(gm, batch, squares), weighted(gradients, weights / batch.size), 1e-9, "function")


def test_clipping_by_a_function_of_the_wrong_shape() -> None:
    model, batch = build()
    gm = perexfx.transform(model, clipping=lambda norms: norms.sum())
    with pytest.raises(perexfx.ArgumentError, match=r"one factor per example, shape \[6\]. Found \[\]"):
        train_step(gm, batch, squares)


@pytest.mark.parametrize("clip_norm", [None, float("inf")])
def test_nothing_is_clipped(clip_norm: float | None) -> None:
    model, batch = build()
    gm = perexfx.transform(model, clip_norm=clip_norm)
    found = train_step(gm, batch, squares)
    assert torch.equal(gm.perexfx.clip_factors, torch.ones(6).double())
    assert_close(found, train_step(model, batch, squares), 1e-9, "unclipped")


def test_an_example_without_gradient_is_not_clipped() -> None:
    model = nn.Linear(3, 2).double()
    gm = perexfx.transform(model, clip_norm=1e-3)
    x = torch.randn(3, 3).double()
    (gm(x) * torch.tensor([[0.0], [1.0], [0.0]])).sum().div(3).backward()
    assert gm.perexfx.norms[0] == 0
    assert gm.perexfx.clip_factors[0] == 1
    assert torch.isfinite(model.weight.grad).all()
    assert float(model.weight.grad.norm()) < 1e-3


def test_examples_that_are_not_finite_count_as_zero_and_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    for strategy in ("auto", "materialize", "gram", "grouped", "loop", "loop_norms", "gram_shift"):
        model, batch = build()
        x = batch.inputs[0].clone()
        x[1, 0, 2, 2], x[4] = float("inf"), float("nan")
        gm = perexfx.transform(model, clip_norm=0.3, strategy=strategy)
        with caplog.at_level(logging.WARNING, "perexfx"):
            found = train_step(gm, Batch((x,), batch.targets), squares)
        assert "2 of 6 examples have gradients that are not finite" in caplog.text
        finite = torch.tensor([0, 2, 3, 5])
        rest = train_step(gm, batch.take(finite), squares)
        assert_close({n: 6 * g for n, g in found.items()}, {n: 4 * g for n, g in rest.items()}, 1e-9, strategy)
        assert gm.perexfx.norms.isfinite().all()


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_whole_and_their_own(how: str, tmp_path: Path) -> None:
    case = BY_NAME["tokens_by_other_means"]
    model, batch = case.build(), case.batch()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.5)
    expected = train_step(gm, batch, case.loss)
    if how == "deepcopy":
        twin = copy.deepcopy(gm)
    else:
        torch.save(gm, tmp_path / "gm.pt")
        twin = torch.load(tmp_path / "gm.pt", weights_only=False)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    found = train_step(twin, batch, case.loss)
    assert_close(found, expected, 1e-12, how)
    assert torch.equal(twin.perexfx.norms, gm.perexfx.norms)
    assert [site.name for site in twin.perexfx.sites] == [site.name for site in gm.perexfx.sites]
    assert repr(twin.perexfx.plan) == repr(gm.perexfx.plan)
    del gm, model
    train_step(twin, batch, case.loss)


def test_a_copy_keeps_parameters_that_the_graph_does_not_use() -> None:
    model, _ = build()
    twin = copy.deepcopy(perexfx.transform(model))
    assert list(twin.state_dict()) == list(model.state_dict())


def test_to_another_dtype() -> None:
    model, batch = build()
    gm = perexfx.transform(model.float())
    gm(batch.inputs[0].float())
    gm.double()
    assert next(model.parameters()).dtype == torch.float64
    found = train_step(gm, batch, squares)
    gradients = one_at_a_time(model, batch, squares)
    factors = (1 / norms_of(gradients)).clamp(max=1) / batch.size
    assert_close(found, weighted(gradients, factors), 1e-9, "double")


def test_train_and_eval_follow() -> None:
    model, batch = build(training=True)
    gm = perexfx.transform(model)
    x = batch.inputs[0]
    torch.manual_seed(1)
    ours = gm(x)
    torch.manual_seed(1)
    assert torch.equal(ours, model(x))
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))
    assert torch.equal(gm(x), model.eval()(x))
    gm.train()
    assert not torch.equal(gm(x), gm(x))


def test_eval_clips_too_and_no_grad_costs_nothing() -> None:
    model, batch = build()
    gm = perexfx.transform(model)
    gm.eval()
    train_step(gm, batch, squares)
    assert gm.perexfx.norms is not None
    with torch.no_grad():
        output = gm(*batch.inputs)
    assert output.grad_fn is None
    assert torch.equal(output, model(*batch.inputs))


def test_frozen_parameters_cost_nothing_and_do_not_count() -> None:
    model, batch = build()
    model.features.requires_grad_(False)
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.5)
    assert [site.name for site in gm.perexfx.sites] == ["head"]
    gradients = one_at_a_time(model, batch, squares)
    factors = (0.5 / norms_of(gradients)).clamp(max=1) / batch.size
    assert_close(train_step(gm, batch, squares), weighted(gradients, factors), 1e-9, "frozen before")


def test_freezing_after_the_transform() -> None:
    model, batch = build()
    gm = perexfx.transform(model, clip_norm=0.5)
    model.features.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    gradients = one_at_a_time(model, batch, squares)
    factors = (0.5 / norms_of(gradients)).clamp(max=1) / batch.size
    assert_close(train_step(gm, batch, squares), weighted(gradients, factors), 1e-9, "frozen after")


def test_unfreezing_after_the_transform_is_refused() -> None:
    model, batch = build()
    model.features.requires_grad_(False)
    gm = perexfx.transform(model)
    model.features.requires_grad_(True)
    with pytest.raises(perexfx.ModeError, match=r"`features.0.weight` was frozen .* Transform the model again"):
        gm(*batch.inputs)


def test_gradients_of_inputs() -> None:
    model, batch = build()
    x = batch.inputs[0].clone().requires_grad_()
    gm = perexfx.transform(model)
    (ours,) = torch.autograd.grad(squares(gm(x), batch.targets), [x])
    (theirs,) = torch.autograd.grad(squares(model(x), batch.targets), [x])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_two_backwards_of_one_forward_count_once_each() -> None:
    model, batch = build()
    gm = perexfx.transform(model, clip_norm=0.5)
    expected = train_step(gm, batch, squares)
    for parameter in model.parameters():
        parameter.grad = None
    x = batch.inputs[0].clone().requires_grad_()
    loss = squares(gm(x), batch.targets)
    torch.autograd.grad(loss, [x], retain_graph=True)  # stops before the clip node
    loss.backward(retain_graph=True)
    loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_close(found, {name: 2 * g for name, g in expected.items()}, 1e-12, "two backwards")


def test_two_forwards_in_one_backward_are_refused() -> None:
    model, batch = build()
    gm = perexfx.transform(model)
    loss = squares(gm(*batch.inputs) + gm(*batch.inputs), batch.targets)
    with pytest.raises(perexfx.ModeError, match="One backward reached two forwards"):
        loss.backward()


def test_two_forwards_with_a_backward_each() -> None:
    model, batch = build()
    gm = perexfx.transform(model)
    expected = train_step(gm, batch, squares)
    for parameter in model.parameters():
        parameter.grad = None
    first, second = (squares(gm(*batch.inputs), batch.targets) for _ in range(2))
    first.backward()
    second.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_close(found, {name: 2 * g for name, g in expected.items()}, 1e-12, "interleaved")


def test_checkpointing_a_transformed_model() -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = build()
    gm = perexfx.transform(model)
    expected = train_step(gm, batch, squares)
    for parameter in model.parameters():
        parameter.grad = None
    squares(checkpoint(gm, *batch.inputs, use_reentrant=False), batch.targets).backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_close(found, expected, 1e-12, "checkpoint")


def test_keyword_calls_and_defaults() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            y = self.layer(x) * scale
            return y if mask is None else y * mask

    model = Scaled().double()
    x, mask = torch.randn(4, 3).double(), torch.rand(4, 2).double()
    plain = perexfx.transform(model)
    assert torch.equal(plain(x=x), model(x))
    assert torch.equal(plain(x, mask=None, scale=2.0), model(x))
    for argument in ({"mask": mask}, {"scale": 3.0}):
        with pytest.raises(perexfx.ArgumentError, match=r"the graph holds for that alone.*Pass `example_inputs` with"):
            plain(x, **argument)
    masked = perexfx.transform(model, {"mask": mask, "x": x})
    assert torch.equal(masked(x, mask=mask), model(x, mask))


def test_new_sequence_lengths_get_a_new_plan() -> None:
    case = BY_NAME["positions_by_range"]
    model = case.build()
    gm = perexfx.transform(model, clip_norm=0.2)
    for length in (5, 2, 8, 5):
        batch = Batch((torch.randint(0, 9, (4, length)),), torch.randn(4).double())
        found = train_step(gm, batch, squares)
        gradients = one_at_a_time(model, batch, squares)
        factors = (0.2 / norms_of(gradients)).clamp(max=1) / 4
        assert_close(found, weighted(gradients, factors), 1e-9, f"length {length}")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_linear_layer_without_inputs() -> None:
    """Its output is the bias."""
    model = nn.Linear(0, 3)
    gm = perexfx.transform(model, clip_norm=None)
    x = torch.randn(4, 0)
    torch.testing.assert_close(gm(x), F.linear(x, model.weight, model.bias))
    gm(x).sum(1).mean().backward()
    assert gm.perexfx.norms is not None
    torch.testing.assert_close(gm.perexfx.norms, torch.full((4,), 3**0.5))


class Median:
    """Clipping that follows the median of the norms: a state of its own."""

    def __init__(self) -> None:
        self.bound, self.calls = torch.tensor(1.0), 0

    def __call__(self, norms: Tensor) -> Tensor:
        self.calls += 1
        self.bound = 0.9 * self.bound + 0.1 * norms.median()
        return (self.bound / norms).clamp(max=1)


def test_only_steps_call_a_clipping_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clipping, model = Median(), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    gm = perexfx.transform(model, torch.randn(4, 6), clipping=clipping, memory_budget=10**6)
    perexfx.verify(gm)
    str(perexfx.report(gm))
    perexfx.report(gm, batch_sizes=[1, 8])
    perexfx.visualize(gm, tmp_path / "graph.html")
    assert clipping.calls == 0
    for n in (4, 5, 9):
        gm(torch.randn(n, 6)).square().sum().backward()
    assert clipping.calls == 3
    assert type(clipping.bound) is Tensor
    assert all(type(p.grad) is Tensor for p in model.parameters())


def test_a_clipping_function_that_kept_a_tensor_of_a_graph() -> None:
    clipping, x = Median(), torch.randn(4, 6)
    gm = perexfx.transform(nn.Linear(6, 3), clipping=clipping)
    perexfx.step_graph(gm, lambda output, _: output.sum(), x, None)
    with pytest.raises(perexfx.ArgumentError, match="`clipping` returned a tensor without numbers"):
        gm(x).sum().backward()
