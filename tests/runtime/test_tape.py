"""What sites share in a backward: Gram matrices of what they read, and one operation for small gradients."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
import perexfx.strategies.gram as grams
from tests.support.marks import needs_kernels
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


class Attention(nn.Module):
    """Queries, keys and values from layers of their own, the latter two narrower."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x).repeat(1, 1, 2), self.v(x).repeat(1, 1, 2)
        return x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output.flatten(1).sum(1) - targets).square().mean()


def a_batch(n: int = 4, t: int = 7, width: int = 12) -> Batch:
    torch.manual_seed(1)
    return Batch((torch.randn(n, t, width).double(),), torch.randn(n).double())


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(), Attention()).double()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The factors whose Gram matrices were made."""
    found: list[Tensor] = []
    original = grams._gram

    def gram(rows: Tensor, blocks: int) -> tuple[Tensor, ...]:
        found.append(rows)
        return original(rows, blocks)

    monkeypatch.setattr(grams, "_gram", gram)
    return found


def assert_exact(gm: nn.Module, model: nn.Module, batch: Batch, clip_norm: float = 0.1) -> None:
    gradients = one_at_a_time(model, batch, squares)
    norms = norms_of(gradients)
    found = train_step(gm, batch, squares)
    torch.testing.assert_close(gm.perexfx.norms, norms, rtol=1e-9, atol=0.0)
    factors = (clip_norm / norms).clamp(max=1) / len(norms)
    assert_close(found, weighted(gradients, factors), 1e-9, "clipped sums")


@pytest.mark.parametrize("has_kernels", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("t", [7, 65, 130])
def test_grams_of_a_common_input_are_made_once(
    t: int, has_kernels: bool, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels form no others."""
    if not has_kernels:
        monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    model, batch = attention(), a_batch(t=t)
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy="gram")
    for _ in range(2):
        made.clear()
        assert_exact(gm, model, batch)
        assert len(made) == 2 * (1 if has_kernels else 1 + 3 + 2)


def test_those_that_take_another_strategy_do_not_count(made: list[Tensor]) -> None:
    model, batch = attention(), a_batch()
    chosen = {"0.q": "gram", "0.k": "materialize", "0.v": "gram"}
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy=chosen)
    users = {site: count for (site, _), (_, count) in gm.perexfx.plan.left_users.items() if site.startswith("0.")}
    assert users == {"0.q": 2, "0.v": 2}
    assert_exact(gm, model, batch)


def test_a_frozen_layer_beside_them() -> None:
    model, batch = attention(), a_batch()
    model[0].k.requires_grad_(False)
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy="gram")
    assert_exact(gm, model, batch)
    model[0].v.requires_grad_(False)  # after the plan was made
    assert_exact(gm, model, batch)


def test_two_backwards_of_one_forward() -> None:
    model, batch = attention(), a_batch()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy="gram")
    loss = squares(gm(*batch.inputs), batch.targets)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in gm.named_parameters() if p.grad is not None}
    loss.backward()
    second = {name: p.grad / 2 for name, p in gm.named_parameters() if p.grad is not None}
    assert_close(second, first, 1e-12, "gradients")


@pytest.mark.parametrize("strategy", ["gram", "materialize"])
def test_a_backward_that_stops_before_the_clip_node_leaves_nothing_behind(strategy: str) -> None:
    model, batch = attention(), a_batch()
    x = batch.inputs[0].requires_grad_()
    gm = perexfx.transform(model, x, clip_norm=0.1, strategy=strategy)
    counts = []
    for _ in range(3):
        torch.autograd.grad(squares(gm(x), batch.targets), [x])
        gc.collect()
        counts.append(sum(type(value) is Tensor for value in gc.get_objects()))
    assert counts[1] == counts[2]


def test_grams_of_values_with_the_same_name_and_other_memory(made: list[Tensor]) -> None:
    """Transposed inputs are copied by each site: no copy is the other's memory."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 5), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            turned = x.transpose(1, 2)
            return torch.cat([self.a(turned), self.b(turned)], 2)

    torch.manual_seed(0)
    model, batch = Turned().double(), a_batch()
    gm = perexfx.transform(model, batch.inputs, clip_norm=0.1, strategy="gram")
    assert_exact(gm, model, batch)


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
    gm.perexfx.keep_gradients = keeps
    found = train_step(gm, batch, squares)
    gradients = one_at_a_time(model, batch, squares)
    torch.testing.assert_close(gm.perexfx.norms, norms_of(gradients), rtol=1e-9, atol=0.0)
    rows = gm.perexfx.clip_factors.reshape(-1, batch.size)
    groups = {name: at for at, sites in enumerate(gm.perexfx.groups.values()) for s in sites for name in s.parameters}
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
