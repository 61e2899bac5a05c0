"""Strategies of users' own: chosen like the others, refused like the others, and held to what they must return."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.ir import Cost, Factors, Gradient, Product, ProductSignature, Signature, Work, squared_norms_of
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output.flatten(1).sum(1) - targets).square().mean()


@dataclass(frozen=True)
class Formed:
    """Forms the gradients of linear layers, and says that it takes no time."""

    name: str = "formed"
    kind: str = "memory"
    scale: float = 1.0
    seconds: float = 0.0

    def refuses(self, signature: Signature) -> str | None:
        return None if isinstance(signature, ProductSignature) else "it is for products"

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        work = Work(self.kind, flops=self.seconds, calls=0)  # pyright: ignore[reportArgumentType]
        return Cost((work,), bytes_held=itemsize * signature.n)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        gradients = factors.gradients()
        return squared_norms_of(gradients) * self.scale, Gradient(gradients)


@dataclass(frozen=True)
class Columns(Formed):
    """Gives norms of a shape that would be added to all others."""

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        squared, held = super().squared_norms(factors)
        return squared[:, None], held


def build() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return model, Batch((torch.randn(4, 7, 5).double(),), torch.randn(4).double())


def test_it_is_chosen_where_it_is_the_fastest_and_exact() -> None:
    model, batch = build()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategies=[Formed()])
    assert [gm.perexfx.plan[name] for name in ("0", "2", "3")] == ["formed", "materialize", "formed"]
    assert "formed" in str(perexfx.report(gm))
    gradients = one_at_a_time(model, batch, squares)
    found = train_step(gm, batch, squares)
    torch.testing.assert_close(gm.perexfx.norms, norms_of(gradients), rtol=1e-9, atol=0.0)
    factors = gm.perexfx.clip_factors / batch.size
    expected = {name: torch.tensordot(factors, gradient, dims=1) for name, gradient in gradients.items()}
    assert_close(found, expected, 1e-9, "clipped sum")
    assert perexfx.check(gm, *batch.inputs, model=model)
    perexfx.verify(gm)


def test_it_can_be_asked_for_by_name_and_says_where_it_does_not_apply() -> None:
    model, batch = build()
    gm = perexfx.transform(model, batch.inputs, strategies=[Formed()], strategy={"3": "formed", "0": "gram"})
    assert gm.perexfx.plan["0"] == "gram"
    assert gm.perexfx.plan["3"] == "formed"
    with pytest.raises(perexfx.StrategyError, match=r"does not apply to site `2`.*it is for products"):
        perexfx.transform(model, batch.inputs, strategies=[Formed()], strategy={"2": "formed"})
    with pytest.raises(perexfx.StrategyError, match="There is no strategy 'formed'"):
        perexfx.transform(model, batch.inputs, strategy={"3": "formed"})


def test_at_the_first_batch_in_copies_and_measured() -> None:
    model, batch = build()
    gm = perexfx.transform(model, strategies=[Formed()], cost_model="measured")
    copied = copy.deepcopy(gm)
    first, second = train_step(gm, batch, squares), train_step(copied, batch, squares)
    assert_close(first, second, 1e-12, "copies")
    names = {a.strategy.name for d in copied.perexfx.plan.decisions for a in d.alternatives}
    assert "formed" in names


def test_wrong_norms_are_found_by_the_check() -> None:
    model, batch = build()
    gm = perexfx.transform(model, batch.inputs, strategies=[Formed(scale=0.5)])
    assert not perexfx.check(gm, *batch.inputs, model=model)


class Unhashable(Formed):
    """As dataclasses that compare and are not frozen."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class Half(Formed):
    """Gives norms in too few digits."""

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        squared, held = super().squared_norms(factors)
        return squared.half(), held


@dataclass(frozen=True)
class Alone(Formed):
    """Gives norms alone."""

    def squared_norms(self, factors: Factors) -> Any:
        return super().squared_norms(factors)[0]


@pytest.mark.parametrize(("strategy", "found"), [(Half(), "torch.float16"), (Alone(), r"torch.float64 \[4\]")])
def test_norms_of_another_kind_are_an_error(strategy: Formed, found: str) -> None:
    model, batch = build()
    gm = perexfx.transform(model, batch.inputs, strategies=[strategy])
    with pytest.raises(perexfx.ShapeError, match=f"in float32 at least, and factors to hold.*Found {found}"):
        squares(gm(*batch.inputs), batch.targets).backward()


def test_strategies_and_rules_may_come_one_by_one() -> None:
    model, batch = build()
    gm = perexfx.transform(model, batch.inputs, strategies=(s for s in [Formed()]), rules=iter(()))
    assert gm.perexfx.plan["0"] == "formed"


def test_norms_of_another_shape_are_an_error() -> None:
    model, batch = build()
    gm = perexfx.transform(model, batch.inputs, strategies=[Columns()])
    message = r"Strategy 'formed' should return squared norms of shape \[4\].*operand `weight` of site `3`.*\[4, 1\]"
    with pytest.raises(perexfx.ShapeError, match=message):
        squares(gm(*batch.inputs), batch.targets).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ([Formed], "should hold instances with a `name`"),
        ([object()], "should hold instances with a `name`"),
        ([Product], "should hold instances with a `name`"),
        ([Formed("")], "should hold instances with a `name`"),
        ([Unhashable()], "cannot be hashed"),
        (Formed(), "`strategies` should be a sequence"),
        (None, "`strategies` should be a sequence"),
        ([Formed(seconds=float("nan"))], "The cost of strategy 'formed' comes to nan seconds"),
        ([Formed("gram")], "two strategies with the name 'gram'"),
        ([Formed("auto")], "two strategies with the name 'auto'"),
        ([Formed("reweight")], "two strategies with the name 'reweight'"),
        ([Formed(), Formed(scale=2.0)], "two strategies with the name 'formed'"),
        ([Formed(kind="magic")], "There is no rate for work of kind 'magic'.*batched_gemm, "),
    ],
)
def test_mistakes(strategies: Any, message: str) -> None:
    model, batch = build()
    with pytest.raises(perexfx.ArgumentError, match=message):
        perexfx.transform(model, batch.inputs, strategies=strategies)
