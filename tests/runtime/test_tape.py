"""What sites share in a backward: Gram matrices of what they read."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
import perexfx.strategies.gram as grams
from tests.support.losses import squares
from tests.support.marks import needs_kernels
from tests.support.oracle import assert_close
from tests.support.sequences import a_batch, assert_exact


class Attention(nn.Module):
    """Queries, keys and values from layers of their own, the latter two narrower."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x).repeat(1, 1, 2), self.v(x).repeat(1, 1, 2)
        return x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


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
