"""The one oracle of all tests: one example at a time, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs by position, their targets, and where the examples are."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    batch_dim: int = 0

    @property
    def size(self) -> int:
        return self.targets.shape[0]

    def take(self, index: Tensor) -> Batch:
        inputs = tuple(x.index_select(self.batch_dim, index) for x in self.inputs)
        return Batch(inputs, self.targets[index], self.batch_dim)

    def example(self, i: int) -> Batch:
        return self.take(torch.tensor([i]))

    def double(self) -> Batch:
        return Batch(tuple(_double(x) for x in self.inputs), _double(self.targets), self.batch_dim)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def one_at_a_time(model: nn.Module, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """Parameter name -> gradient of each example's own loss, `[B, *shape]`."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: list[tuple[Tensor, ...]] = []
    for i in range(batch.size):
        single = batch.example(i)
        found = torch.autograd.grad(
            loss(model(*single.inputs), single.targets), list(named.values()), allow_unused=True
        )
        rows.append(tuple(torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), found, strict=True)))
    return {
        name: torch.stack([row[at] for row in rows]) if rows else p.new_zeros(0, *p.shape)
        for at, (name, p) in enumerate(named.items())
    }


def norms_of(gradients: Mapping[str, Tensor]) -> Tensor:
    """Norm of each example's gradient over all parameters together, `[B]`."""
    return (
        torch.stack([g.reshape(len(g), -1).square().sum(1) if len(g) else g.new_zeros(0) for g in gradients.values()])
        .sum(0)
        .sqrt()
    )


def weighted(gradients: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """`sum_i factors[i] * gradient_i` of each parameter."""
    return {name: torch.tensordot(factors.to(g.dtype), g, dims=1) for name, g in gradients.items()}


def train_step(gm: nn.Module, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """What one ordinary backward leaves in `.grad`: zeros where it leaves nothing."""
    for parameter in gm.parameters():
        parameter.grad = None
    loss(gm(*batch.inputs), batch.targets).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in gm.named_parameters()
        if p.requires_grad
    }


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """Relative to each value's largest entry, or to a tenth of the largest of all where that is more: a gradient that
    is zero because its parts cancel has the rounding of the parts."""
    assert found.keys() == expected.keys()
    found = {name: value.detach() for name, value in found.items()}
    expected = {name: value.detach() for name, value in expected.items()}
    scale = max((float(e.abs().max()) for e in expected.values() if e.numel()), default=0.0) or 1.0
    for name, value in expected.items():
        own = float(value.abs().max()) if value.numel() else 0.0
        difference = float((found[name] - value).abs().max()) if value.numel() else 0.0
        assert difference <= tolerance * max(own, 0.1 * scale), (
            f"{what}: `{name}` differs by {difference:.3e}, largest entry {own:.3e}, tolerance {tolerance:.0e}"
        )
