"""One operation for the small gradients of all sites."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.runtime.face import runtime_of
from perexfx.runtime.step_options import StepOptions
from tests.support.losses import squares
from tests.support.oracle import assert_close, norms_of, one_at_a_time, train_step, weighted
from tests.support.sequences import a_batch, assert_exact


class Norms(nn.Module):
    """Small gradients of many shapes, a scalar among them, beside a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(3, 12))
        self.last = nn.Linear(84, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x)).tanh() * self.scale
        return self.last((y.unflatten(2, (1, 12)) + self.shift).mean(2).flatten(1))


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer", torch.reciprocal])
@pytest.mark.parametrize("keeps", [False, True])
def test_small_gradients(clipping: object, keeps: bool) -> None:
    torch.manual_seed(0)
    model, batch = Norms().double(), a_batch(5)
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, clipping=clipping)  # pyright: ignore[reportArgumentType]
    options = StepOptions(gradients_to=dict[str, Tensor]().update if keeps else None)
    with runtime_of(gm).stepping(options):
        found = train_step(gm, batch, squares)
    gradients = one_at_a_time(model, batch, squares)
    torch.testing.assert_close(gm.perexfx.norms, norms_of(gradients), rtol=1e-9, atol=0.0)
    rows = gm.perexfx.clip_factors.reshape(-1, batch.size)
    members = enumerate(runtime_of(gm).sites.groups.values())
    groups = {name: at for at, sites in members for site in sites for name in site.parameters}
    for name, gradient in gradients.items():
        factors = rows[groups[name] if clipping == "per_layer" else 0] / batch.size
        expected = torch.tensordot(factors, gradient, dims=1)
        assert_close({name: found[name]}, {name: expected}, 1e-9, "clipped sum")


@pytest.mark.parametrize("trained", ["bias", "scale"])
@pytest.mark.parametrize("n", [1, 4])
def test_small_gradients_alone(trained: str, n: int) -> None:
    torch.manual_seed(0)
    model, batch = Norms().double(), a_batch(n)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1)
    assert_exact(gm, model, batch)


def test_an_empty_batch() -> None:
    torch.manual_seed(0)
    model = Norms().double()
    gm = perexfx.transform(model, clip_norm=0.1)
    gm(torch.zeros(0, 7, 12).double()).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in gm.parameters())


def test_an_example_that_is_not_finite() -> None:
    torch.manual_seed(0)
    model, batch = Norms().double(), a_batch()
    others = batch.take(torch.tensor([0, 2, 3]))
    gradients = one_at_a_time(model, others, squares)
    factors = (0.1 / norms_of(gradients)).clamp(max=1) / batch.size
    batch.inputs[0][1] = torch.nan
    gm = perexfx.transform(model, clip_norm=0.1)
    assert_close(train_step(gm, batch, squares), weighted(gradients, factors), 1e-9, "clipped sums")
    assert gm.perexfx.clip_factors[1] == 0


def test_parameters_of_two_dtypes() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.float()).double().relu())

    torch.manual_seed(0)
    model, batch = Mixed(), a_batch()
    exact = copy.deepcopy(model).double()
    exact.forward = lambda x: exact.second(exact.first(x).relu())  # pyright: ignore[reportAttributeAccessIssue]
    gradients = one_at_a_time(exact, batch, squares)
    gm = perexfx.transform(model, clip_norm=0.1)
    found = train_step(gm, batch, squares)
    factors = (0.1 / norms_of(gradients)).clamp(max=1) / batch.size
    assert {name: value.dtype for name, value in found.items()} == {n: p.dtype for n, p in model.named_parameters()}
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "clipped sums")


def test_gradients_are_tensors_of_their_own() -> None:
    torch.manual_seed(0)
    model, batch = Norms().double(), a_batch()
    gm = perexfx.transform(model, clip_norm=0.1)
    train_step(gm, batch, squares)
    for parameter in gm.parameters():
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().nbytes() == parameter.grad.nbytes
