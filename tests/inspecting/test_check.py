"""The check agrees where the transform is right, names what is wrong where it is not, and leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.analysis.axes.elementwise import pointwise
from perexfx.analysis.axes.table import RULES as AXIS_RULES
from perexfx.inspecting.check.result import CheckResult
from perexfx.ir.factors import Gradient, Product
from perexfx.layers.layer_norm import LayerNorm
from perexfx.layers.linear import Linear
from perexfx.runtime import clip_factors
from perexfx.runtime.face import runtime_of
from perexfx.runtime.state import Runtime
from perexfx.strategies.outer import Outer
from tests.support.cases import BY_NAME, squares

SAMPLE = (
    "batch_norm_frozen batch_second conv2d_groups conv_on_frames dropout_and_pooling embedding_padding "
    "embedding_tied_to_head merged_between several_inputs tiny_vit tokens_by_other_means under_no_grad "
    "unused_and_detached weight_standardised"
).split()


class Net(nn.Module):
    """Everything that a check could disturb: random numbers, a counter, modes; and an output of many parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
        self.calls += 1
        h = F.dropout(self.norm(torch.tanh(self.first(x))), 0.5, self.training)
        return {"logits": self.last(h) * scale, "ids": h.argmax(1), "pair": (h, h.sum(1))}


def build() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(6, 6).double()


def check_net(**options: Any) -> CheckResult:
    model, x = build()
    return perexfx.check(perexfx.transform(model, clip_norm=0.5), x, **options)


def failing(result: CheckResult) -> dict[str, str]:
    return {verdict.name: verdict.reason for verdict in result.verdicts if not verdict.ok}


@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_right_passes(name: str) -> None:
    case = BY_NAME[name]
    model, batch = case.build(), case.batch()
    gm = perexfx.transform(model, clip_norm=0.3, batch_dim=case.batch_dim)
    result = perexfx.check(gm, batch.inputs)
    assert result, result
    assert (result.reference, result.tolerance, result.examples) == ("the captured graph", 1e-9, 4)
    result = perexfx.check(gm, batch.inputs, model=model, loss_fn=case.loss, targets=batch.targets, examples=3)
    assert result, result
    assert (result.reference, result.examples, result.notes) == ("the model", 3, ())
    assert [v.name for v in result.parameters] == [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "options",
    [
        {"clipping": "automatic"},
        {"clipping": "per_layer"},
        {"clip_norm": None},
        {"loss_reduction": "sum"},
        {"strategy": "materialize"},
        {"memory_budget": 10**9},
    ],
)
def test_every_kind_of_clipping(options: dict[str, Any]) -> None:
    model, x = build()
    result = perexfx.check(perexfx.transform(model, **{"clip_norm": 0.3, **options}), {"x": x}, model=model)
    assert result, result


def test_float32_and_half_have_tolerances_of_their_own() -> None:
    model, x = build()
    gm = perexfx.transform(model.float())
    assert perexfx.check(gm, x.float()).tolerance == 1e-4
    assert perexfx.check(gm, x.float(), tolerance=1e-5).tolerance == 1e-5
    assert perexfx.check(gm.bfloat16(), x.bfloat16()).tolerance == 0.1
    assert perexfx.check(gm.double(), x).tolerance == 1e-9


def test_a_clipping_function_is_not_called() -> None:
    model, x = build()
    seen: list[Tensor] = []
    gm = perexfx.transform(model, clipping=lambda norms: seen.append(norms) or norms)
    assert perexfx.check(gm, x)
    assert not seen


def test_the_strategies_are_those_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2).double()
    gm = perexfx.transform(model, strategy={"weight": "gram"})
    chosen = []
    original = Runtime.prepare

    def prepare(runtime: Any, kind: Any, n: int) -> Any:
        plan = original(runtime, kind, n)
        chosen.append((n, plan["weight"]))
        return plan

    monkeypatch.setattr(Runtime, "prepare", prepare)
    assert perexfx.check(gm, torch.randn(7, 9, 3).double(), examples=2)
    assert chosen == [(7, "gram"), (2, "gram")]


# What is wrong is named


def wrong_factors(rule: type, operand: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = rule.backward

    def backward(self: Any, call: Any) -> Any:
        gradients, factors = original(self, call)
        if operand in factors:
            factors[operand] = change(factors[operand])
        return gradients, factors

    monkeypatch.setattr(rule, "backward", backward)


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_factors(LayerNorm, "weight", lambda factors: Gradient(factors.gradients() * (1 + 1e-7)), monkeypatch)
    result = check_net()
    assert not result
    assert list(failing(result)) == ["norms", "norm.weight"]
    assert failing(result)["norm.weight"].endswith("is wrong")
    assert result.parameters[2].error == pytest.approx(1e-7, rel=1e-3)
    lines = str(result).splitlines()
    assert lines[0].startswith("perexfx check: FAILED, 4 examples one at a time by the captured graph, eval mode, ")
    assert [line.split()[0] for line in lines if "is wrong" in line] == ["norm.weight"]


def test_a_wrong_gradient_of_one_example_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(factors: Any) -> Any:
        each = factors.gradients().clone()
        each[2] *= 1.01
        return Gradient(each)

    wrong_factors(Linear, "bias", change, monkeypatch)
    result = check_net()
    assert failing(result).keys() == {"norms", "first.bias", "last.bias"}
    assert failing(result)["first.bias"] == "the gradient of example 2 is wrong"
    assert result.parameters[1].error == pytest.approx(0.01)
    assert result.parameters[0].ok
    assert failing(result)["norms"].startswith("example 2 has ")


def test_gradients_of_inputs_that_are_wrong_show_in_earlier_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LayerNorm.backward

    def backward(self: Any, call: Any) -> Any:
        gradients, factors = original(self, call)
        return {name: 2 * gradient for name, gradient in gradients.items()}, factors

    monkeypatch.setattr(LayerNorm, "backward", backward)
    assert failing(check_net()).keys() == {"norms", "first.weight", "first.bias"}


def test_a_missing_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Linear.backward
    monkeypatch.setattr(Linear, "backward", lambda self, call: (original(self, call)[0], {}))
    reasons = failing(check_net())
    assert reasons.keys() == {"norms", "first.weight", "first.bias", "last.weight", "last.bias"}
    assert reasons["last.weight"].endswith("is missing")


def test_a_wrong_norm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Outer.squared_norms

    def squared_norms(self: Any, factors: Any) -> Any:
        squared, held = original(self, factors)
        return squared * 1.001, held

    monkeypatch.setattr(Outer, "squared_norms", squared_norms)
    model, x = build()
    result = perexfx.check(perexfx.transform(model, clip_norm=0.5, strategy="outer"), x)
    assert list(failing(result)) == ["norms"]
    assert failing(result)["norms"].startswith("example ")


def test_wrong_clip_factors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_factors, "_flat", lambda norms, clip_norm: torch.full_like(norms, 0.5))
    reasons = failing(check_net())
    assert list(reasons) == ["norms"]
    assert reasons["norms"].startswith("the clip factor of example ")


def test_a_wrong_sum_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Product.weighted_sum
    monkeypatch.setattr(Product, "weighted_sum", lambda self, weights: original(self, weights.flip(0)))
    model, x = build()
    reasons = failing(perexfx.check(perexfx.transform(model, clip_norm=0.5, strategy="outer"), x))
    assert reasons.keys() == {"first.weight", "last.weight"}
    assert set(reasons.values()) == {"`.grad` is not the clipped sum"}


def test_a_capture_that_is_not_the_model_is_found() -> None:
    model, x = build()
    gm = perexfx.transform(model)
    assert perexfx.check(gm, x, model=model)
    model.norm.eps = 0.1
    assert perexfx.check(gm, x)
    result = perexfx.check(gm, x, model=model)
    assert failing(result)["outputs"].startswith("`output['")
    assert "first.weight" in failing(result)


def test_outputs_of_another_structure_are_shown() -> None:
    model, x = build()
    gm = perexfx.transform(model)
    model.forward = lambda x: Net.forward(model, x)["logits"]  # pyright: ignore[reportArgumentType]
    result = perexfx.check(gm, x, model=model)
    assert "the transformed module returns shapes {\"output['logits']\": [4, 3]" in failing(result)["outputs"]
    assert result.parameters == ()


def test_a_model_that_is_another_alone_is_found() -> None:
    class Alone(nn.Linear):
        twice = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if self.twice and len(x) == 1 else 1)

    model = Alone(6, 3).double()
    gm = perexfx.transform(model)
    model.twice = True
    result = perexfx.check(gm, torch.randn(4, 6).double(), model=model)
    assert failing(result)["outputs"] == "`output` of example 0 is another alone"


def test_the_model_is_read_with_the_parameters_and_modes_of_gm() -> None:
    model, x = build()
    gm = copy.deepcopy(perexfx.transform(model.train()))
    with torch.no_grad():
        gm.last.weight.mul_(3)
        gm.calls.add_(1)
    gm.eval()
    result = perexfx.check(gm, x, model=model)
    assert result, result
    assert result.mode == "eval"
    assert model.training
    assert model.norm.training


# Losses


def mean_loss(output: Any, targets: Tensor) -> Tensor:
    return squares(output["logits"], targets)


def test_a_loss_that_joins_otherwise_is_found() -> None:
    model, x = build()
    targets = torch.randn(6).double()
    by_mean, by_sum = (perexfx.transform(model, loss_reduction=kind) for kind in ("mean", "sum"))
    assert perexfx.check(by_mean, x, loss_fn=mean_loss, targets=targets)
    result = perexfx.check(by_sum, x, loss_fn=mean_loss, targets=targets)
    assert 'pass `loss_reduction="mean"` to `transform`' in failing(result)["loss"]
    assert perexfx.check(by_sum, x, loss_fn=lambda o, t: mean_loss(o, t) * len(t), targets=targets)


def test_a_loss_that_mixes_is_found() -> None:
    result = check_net(loss_fn=lambda output, _: (output["logits"] - 0.5 * output["logits"].mean(0)).square().sum())
    assert failing(result)["loss"].endswith("one example's loss depends on others")
    assert "first.weight" in failing(result)


def test_targets_in_containers_and_along_the_batch_dim() -> None:
    case = BY_NAME["batch_second"]
    model, batch = case.build(), case.batch(6)
    gm = perexfx.transform(model, batch_dim=1)

    def loss(output: Tensor, targets: Any) -> Tensor:
        return ((output - targets["y"].transpose(0, 1)) * targets["weight"][:, None, None]).square().sum() / len(output)

    targets = {"y": torch.randn(5, 6, 4).double(), "weight": torch.rand(6).double()}
    result = perexfx.check(gm, batch.inputs, model=model, loss_fn=loss, targets=targets)
    assert result, result
    targets["y"] = torch.randn(6, 6, 4).double()
    with pytest.raises(perexfx.ArgumentError, match="is their number on both"):
        perexfx.check(gm, batch.inputs, loss_fn=loss, targets=targets)
    targets["y"] = torch.randn(5, 1, 4).double()
    with pytest.raises(perexfx.ArgumentError, match=r"`targets` should have the 6 examples .* of shape \[5, 1, 4\]"):
        perexfx.check(gm, batch.inputs, loss_fn=loss, targets=targets)


# Mixing


class Rolls(nn.Module):
    def __init__(self, share: float) -> None:
        super().__init__()
        self.layer, self.share = nn.Linear(6, 3), share

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.layer(x)
        return h, h + self.share * h.roll(1, 0)


def test_mixing_that_the_analysis_missed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXIS_RULES, "roll", pointwise)
    model, x = Rolls(1e-7).double(), torch.randn(3, 6).double()
    result = perexfx.check(perexfx.transform(model), x, tolerance=1e-3)
    assert not failing(result)
    assert not result
    found = [(mixed.output, mixed.changed, mixed.moved) for mixed in result.mixing]
    assert found == [("output[1]", 0, 1), ("output[1]", 1, 2), ("output[1]", 2, 0)]
    assert all(0 < mixed.size < 1e-6 for mixed in result.mixing)
    assert "changing example 0 moves `output[1]` of example 1 by " in str(result)
    assert failing(perexfx.check(perexfx.transform(model), x)).keys() >= {"outputs", "layer.weight"}


def test_many_pairs_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXIS_RULES, "roll", pointwise)
    result = perexfx.check(perexfx.transform(Rolls(1.0)), torch.randn(9, 6), examples=8)
    assert len(result.mixing) == 8
    assert "... and 3 more pairs of examples" in str(result)


def test_mixing_of_ids_is_found_and_equal_inputs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AXIS_RULES, "roll", pointwise)
    model = nn.Sequential(nn.Embedding(9, 6), Rolls(1.0))
    gm = perexfx.transform(model)
    assert len(perexfx.check(gm, torch.randint(0, 9, (3, 4))).mixing) == 3
    assert len(perexfx.check(gm, torch.tensor([[1, 2, 3]]).repeat(3, 1)).mixing) == 3
    result = perexfx.check(gm, torch.ones(3, 4, dtype=torch.long))
    assert not result.mixing
    assert result.notes[0] == "example 0 could not be changed: its inputs are all alike"
    zeros = perexfx.check(perexfx.transform(Rolls(1.0)), torch.zeros(3, 6))
    assert len(zeros.mixing) == 3


def test_outputs_without_examples_must_not_move() -> None:
    class Reports(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("table", torch.ones(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.table * 2

    model, x = Reports(), torch.randn(3, 6)
    gm = perexfx.transform(model)
    assert perexfx.check(gm, x, model=model)
    model.forward = lambda x: (model.layer(x), x.sum() * torch.ones(2))
    result = perexfx.check(gm, x, model=model)
    assert {(mixed.output, mixed.moved) for mixed in result.mixing} == {("output[1]", None)}
    assert "moves `output[1]` which belongs to no example by" in str(result)


def test_one_example_says_nothing_about_mixing() -> None:
    result = check_net(examples=1)
    assert result
    assert result.notes == ("of one example alone nothing can be said about mixing",)


# Randomness


def test_a_random_forward_is_checked_in_eval_mode() -> None:
    model, x = build()
    gm = perexfx.transform(model.train())
    result = perexfx.check(gm, x, model=model)
    assert result, result
    assert result.mode == "eval"
    assert result.notes == ("the forward is random in train mode, so eval mode was checked",)
    assert "note: the forward is random in train mode" in str(result)
    gm.norm.eval()
    assert perexfx.check(gm, x).notes == ("the forward is random in as set mode, so eval mode was checked",)


def test_a_forward_that_is_not_random_is_checked_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.0))
    assert perexfx.check(perexfx.transform(model), torch.randn(4, 6)).mode == "train"
    assert perexfx.check(perexfx.transform(model.eval()), torch.randn(4, 6)).mode == "eval"


def test_a_forward_that_is_always_random_cannot_be_compared() -> None:
    class Noisy(nn.Module):
        def __init__(self, doubles: bool) -> None:
            super().__init__()
            self.layer, self.doubles = nn.Linear(6, 3), doubles

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            if self.training and self.doubles:
                h = h * 2
            return h + torch.rand_like(h)

    for doubles, mode in ((False, "eval"), (True, "train")):  # the latter's graph holds for train mode alone
        result = perexfx.check(perexfx.transform(Noisy(doubles)), torch.randn(4, 6))
        assert not result
        assert result.mode == mode
        assert "two equal calls give different results" in failing(result)["outputs"]


# Left as it was


def test_everything_is_left_as_it_was() -> None:
    model, x = build()
    model.train()
    gm = perexfx.transform(model, x, clip_norm=0.5)
    gm.norm.eval()
    model.last.requires_grad_(False)
    gm(x)["logits"].sum().backward()
    hooked: list[Tensor] = []
    model.first.weight.register_hook(hooked.append)
    state = runtime_of(gm)
    before = dict(vars(state)), dict(state.plans), dict(state._analyses)
    gradients = {name: p.grad for name, p in gm.named_parameters()}
    flags = [m.training for m in (*gm.modules(), *model.modules())]
    fails = FailsAlone(model)
    random, given, calls = torch.get_rng_state(), x.clone().requires_grad_(), gm.calls.clone()
    with torch.no_grad():
        assert perexfx.check(gm, given, model=model)
        with pytest.raises(perexfx.ArgumentError, match="does not run on example 0 alone"):
            perexfx.check(gm, given, model=fails)
    assert (dict(vars(state)), state.plans, state._analyses) == before
    assert all(p.grad is gradients[name] for name, p in gm.named_parameters())
    assert [m.training for m in (*gm.modules(), *model.modules())] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert given.grad is None
    assert torch.equal(gm.calls, calls)
    assert not hooked


class FailsAlone(Net):
    """A model with parts of another, that needs two examples."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"] = dict(other._modules)

    def forward(self, x: Tensor, scale: float = 2.0) -> dict[str, Any]:
        if len(x) == 1:
            raise RuntimeError("of one example there is no variance")
        return super().forward(x, scale)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_gradients_are_off(mode: Any) -> None:
    model, x = build()
    gm = perexfx.transform(model)
    with mode():
        result = perexfx.check(gm, x + 1, model=model)
    assert result, result


def test_examples_that_are_not_finite() -> None:
    model, x = build()
    x[1] = math.nan
    gm = perexfx.transform(model, clip_norm=0.5)
    result = perexfx.check(gm, x, model=model)
    assert result, result
    assert result.notes == ("1 of 4 examples have gradients that are not finite; they must count as zero",)


def test_parameters_frozen_after_the_transform_are_left_out() -> None:
    model, x = build()
    gm = perexfx.transform(model)
    model.first.requires_grad_(False)
    result = perexfx.check(gm, x)
    assert result, result
    assert [v.name for v in result.parameters] == ["norm.weight", "norm.bias", "last.weight", "last.bias"]


# As it reads


def test_the_table() -> None:
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    result = perexfx.check(perexfx.transform(model), torch.eye(2).double())
    lines = str(result).splitlines()
    assert lines[0] == (
        "perexfx check: ok, 2 examples one at a time by the captured graph, train mode, tolerance 1e-09"
    )
    assert [line.split()[0] for line in lines[2:]] == ["error", "outputs", "norms", "weight", "bias"]
    assert all(line.endswith("ok") for line in lines[3:])


def test_long_tables_name_the_worst_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)), nn.LayerNorm(3)).double()
    gm, x = perexfx.transform(model), torch.randn(4, 3).double()
    lines = str(perexfx.check(gm, x)).splitlines()
    assert len(lines) == 2 + 1 + 2 + 12 + 1
    assert lines[-1].startswith("30 more parameters")
    wrong_factors(LayerNorm, "weight", lambda factors: Gradient(factors.gradients() * 2), monkeypatch)
    assert "20.weight" in str(perexfx.check(gm, x))


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"examples": 0}, "`examples` should be a positive number. Found 0"),
        ({"examples": 2.0}, "`examples` should be a positive number. Found 2.0"),
        ({"tolerance": 0}, "`tolerance` should be a relative error between 0 and 1. Found 0"),
        ({"tolerance": "tight"}, "`tolerance` should be a relative error between 0 and 1. Found 'tight'"),
        ({"loss_fn": "mse"}, "`loss_fn` should be a function of output and targets. Found str"),
        ({"targets": torch.zeros(6)}, "`targets` are for `loss_fn`, which is missing"),
        (
            {"loss_fn": lambda o, t: o["logits"]},
            r"`loss_fn` should return a tensor of shape \[\]. Found shape \[4, 3\]",
        ),
        ({"loss_fn": lambda o, t: 1.0}, r"`loss_fn` should return a tensor of shape \[\]. Found float"),
        ({"loss_fn": lambda o, t: torch.zeros(())}, "The loss depends on no trainable parameter"),
        ({"model": nn.Linear(2, 2)}, r"`model` should be what `gm` was made from. Parameter `first.weight` is not the"),
        ({"model": "net"}, "`model` should be what `gm` was made from. Found str"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(perexfx.ArgumentError, match=message):
        check_net(**options)


def test_modules_and_inputs_that_do_not_fit() -> None:
    model, x = build()
    gm = perexfx.transform(model)
    with pytest.raises(perexfx.ArgumentError, match=r"`gm` should come from `perexfx.transform`. Found Net."):
        perexfx.check(model, x)
    with pytest.raises(perexfx.ArgumentError, match=r"`model` should be what `gm` was made from. Found Net."):
        perexfx.check(gm, x, model=gm)
    with pytest.raises(perexfx.ArgumentError, match=r"`inputs` does not fit `Net.forward"):
        perexfx.check(gm, (x, 2.0, 3.0))
    with pytest.raises(perexfx.ArgumentError, match="`inputs` has no examples"):
        perexfx.check(gm, x[:0])
    with pytest.raises(perexfx.ArgumentError, match=r"`scale` was 2.0 when the model was transformed"):
        perexfx.check(gm, (x, 3.0))
    integers = perexfx.transform(nn.Sequential(nn.Linear(6, 3), Argmax()).double())
    with pytest.raises(perexfx.ArgumentError, match=r"no floating-point numbers to make a loss of. Pass `loss_fn`"):
        perexfx.check(integers, x)


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class ByKeyword(nn.Module):
    """A model with arguments that have no place."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.layer = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor, scale: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
        rows = self.rows(ids) * scale
        return self.layer(rows if mask is None else rows * mask[..., None]).mean(1)


def test_models_with_arguments_by_keyword_alone() -> None:
    torch.manual_seed(0)
    model, ids = ByKeyword(), torch.randint(0, 10, (4, 5))
    x = {"ids": ids, "mask": torch.rand(4, 5) < 0.5}
    assert perexfx.check(perexfx.transform(model, x), x, model=model)
    assert perexfx.check(perexfx.transform(model), ids, model=model)
