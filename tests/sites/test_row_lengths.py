"""Maps of parameters: whose rows are orthogonal keep every strategy, and weigh norms; others are pulled back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.site import Site
from perexfx.kernels.pooled import pooled_kernel
from tests.support.cases import BY_NAME
from tests.support.cases_maps import JOINED, MAPS, SLIDES
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


def site_of(name: str) -> Site:
    case = BY_NAME[name]
    return perexfx.transform(case.build(), case.batch().inputs).perexfx.sites[0]


def reason_of(name: str) -> str:
    case = BY_NAME[name]
    plan = perexfx.transform(case.build(), case.batch().inputs).perexfx.plan
    assert plan is not None
    return plan.decisions[0].reason


@pytest.mark.parametrize("name", MAPS)
def test_orthogonal_rows_leave_the_choice(name: str) -> None:
    assert reason_of(f"map_{name}") == ""


@pytest.mark.parametrize("name", JOINED)
def test_others_are_pulled_back(name: str) -> None:
    assert reason_of(f"map_{name}") == "pulled back to its parameters"


@pytest.mark.parametrize("name", [*MAPS, *(f"pooled {name}" for name in SLIDES)])
def test_lengths_are_those_of_the_maps_jacobian(name: str) -> None:
    """`d = diag(L L^T)`, and `L L^T` is diagonal: by autograd, row by row."""
    case = BY_NAME[name.replace("pooled ", "pooled_") if name.startswith("pooled") else f"map_{name}"]
    model = case.build()
    (operand,) = perexfx.transform(model, case.batch().inputs).perexfx.sites[0].operands
    expression = operand.expression
    parameters = dict(model.named_parameters())
    values = [parameters[name] for name in expression.parameters]
    buffers = dict(model.named_buffers())
    constants = [buffers[name] for name in expression.constants]
    if expression.function is None:
        return
    rows = []
    value = expression.function(*values, *constants)
    for entry in value.flatten():
        found = torch.autograd.grad(entry, values, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in found]))
    L = torch.stack(rows)
    found = torch.ones(value.shape, dtype=torch.float64)
    assert expression.lengths is not None
    if expression.lengths.function is not None:
        scale, *vectors = expression.lengths.function(*values, *constants)
        for axis, vector in zip(expression.lengths.axes, vectors, strict=True):
            found = found * vector.square().reshape(-1, *[1] * (value.dim() - 1 - axis))
        found = found * scale.square()
    torch.testing.assert_close(L @ L.T, torch.diag(found.flatten()), rtol=1e-12, atol=1e-12)


class _Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), torch.cat([self.a, self.b]))


def test_a_part_that_is_frozen_later_counts_no_more() -> None:
    model, batch = _Concatenated().double(), BY_NAME["map_rows_scaled"].batch()
    gm = perexfx.transform(model, batch.inputs, clip_norm=1e-3)
    model.b.requires_grad_(False)
    truth = one_at_a_time(model, batch, BY_NAME["map_rows_scaled"].loss)
    found = train_step(gm, batch, BY_NAME["map_rows_scaled"].loss)
    norms = norms_of(truth)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    assert_close(found, weighted(truth, (1e-3 / norms).clamp(max=1) / batch.size), 1e-9, "sums")


class _OfAnother:
    """A strategy that knows nothing of taps."""

    name = "another"

    def refuses(self, signature: Signature) -> str | None:
        return None

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        return Cost((Work("memory", bytes=1),), 0, holds_factors=True)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        return factors.gradients().flatten(1).square().sum(1), factors


def test_a_strategy_that_does_not_say_so_is_not_asked_to_weigh_taps() -> None:
    case = BY_NAME["pooled_3x3"]
    batch = case.batch()
    gm = perexfx.transform(case.build(), batch.inputs, strategies=[_OfAnother()])
    assert gm.perexfx.plan is not None
    (alternative,) = [a for a in gm.perexfx.plan.decisions[0].alternatives if a.strategy.name == "another"]
    assert alternative.cost is None
    assert alternative.refusal is not None
    assert "does not say that it weighs the taps" in alternative.refusal


@pytest.mark.parametrize("name", [*MAPS, *JOINED])
def test_shapes_of_parameters_need_no_inputs(name: str) -> None:
    case = BY_NAME[f"map_{name}"]
    known = perexfx.transform(case.build()).perexfx.sites[0].operands[0].expression.lengths
    asked = site_of(f"map_{name}").operands[0].expression.lengths
    assert (known is None) == (asked is None)
    assert known is None or asked is None or known.axes == asked.axes


def test_pooled_kernels_are_sums_of_taps() -> None:
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    slides = ((3, 1, 1, 1),) * 2
    found = pooled_kernel(weight, torch.tensor([0, 1]), slides)
    rows = torch.stack([weight[:, :, 0], weight[:, :, 1] + weight[:, :, 2]], 2)
    expected = torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], 3)
    torch.testing.assert_close(found, expected)


class _Weighted(nn.Module):
    """A layer whose weight is a function of this module."""

    def __init__(self, make: Callable[[_Weighted], Tensor], c: Tensor) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))
        self.make = make
        self.register_buffer("c", c)

    c: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.make(self))


@torch.fx.wrap
def flip(w: Tensor) -> Tensor:
    """Has the name of a move, and is none."""
    return w * 3


class clone(torch.autograd.Function):
    """The same, by its backward."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0] * 7


def _parts(m: _Weighted, *places: int) -> Tensor:
    parts = m.w.chunk(2)
    return torch.cat([parts[at] for at in places])


NEAR_MISSES: dict[str, tuple[Callable[[_Weighted], Tensor], Tensor]] = {
    "another function of that name": (lambda m: flip(m.w), torch.ones(1)),
    "a custom function of that name": (lambda m: clone.apply(m.w), torch.ones(1)),
    "one part by two numbers": (lambda m: _parts(m, 1, -1), torch.ones(1)),
    "one part by a number and a boolean": (lambda m: _parts(m, 1, True), torch.ones(1)),
    "a constant seen in the shape of a parameter": (lambda m: m.v + m.c.view_as(m.w), torch.randn(6, 4)),
    "alpha": (lambda m: torch.add(m.w, m.v, alpha=3), torch.ones(1)),
    "a number whose square is out of range": (lambda m: m.w * 1e-9, torch.ones(1)),
}


def _assert_exact(model: nn.Module, x: Tensor) -> str:
    """Norms and clipped sums against one example at a time. Returns: why there was no choice."""
    batch = Batch((x,), torch.zeros(len(x), dtype=x.dtype))
    truth = one_at_a_time(model, batch, BY_NAME["map_rows_scaled"].loss)
    norms = norms_of(truth)
    gm = perexfx.transform(model, x, clip_norm=1e-3)
    found = train_step(gm, batch, BY_NAME["map_rows_scaled"].loss)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    assert_close(found, weighted(truth, (1e-3 / norms).clamp(max=1) / len(x)), 1e-9, "sums")
    assert gm.perexfx.plan is not None
    return gm.perexfx.plan.decisions[0].reason


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_pulled_back(name: str) -> None:
    torch.manual_seed(0)
    make, constant = NEAR_MISSES[name]
    x = torch.randn(5, 4, dtype=torch.float64)
    assert _assert_exact(_Weighted(make, constant).double(), x) == "pulled back to its parameters"


@pytest.mark.parametrize("constant", [torch.tensor(0.1), torch.tensor(100003), torch.rand(6, 1) + 0.5])
def test_constants_of_other_dtypes_lose_no_digits(constant: Tensor) -> None:
    model = _Weighted(lambda m: m.w / m.c, torch.ones(1)).double()
    model.c = constant
    assert _assert_exact(model, torch.randn(5, 4, dtype=torch.float64)) == ""


@pytest.mark.parametrize("make", [lambda m: m.w * m.c, lambda m: m.w + m.c])
def test_a_constant_of_another_shape_is_an_error(make: Callable[[_Weighted], Tensor]) -> None:
    model, x = _Weighted(make, torch.rand(6, 1)), torch.randn(5, 4)
    gm = perexfx.transform(model, x)
    gm.c = torch.rand(4)
    with pytest.raises(perexfx.ShapeError, match=r"was of shape \[6, 1\] when the model was transformed. Found \[4\]"):
        gm(x).sum().backward()
