"""Small gradients at hand that wait for the clip node, which takes them all at once.

Promises: their norms and clipped sums are what each alone would give, up to rounding; one operation for all of a dtype
takes the place of ten for each. What waits is small, so that copying it side by side costs less than it saves. Whoever
traces sees each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient
from perexfx.ir.norms import squared_norms_of
from perexfx.ir.site import Key

SMALL = 1 << 14
"""Elements, of all examples, that may wait."""


def may_wait(factors: Factors) -> TypeGuard[Gradient]:
    """Whether factors are small gradients at hand."""
    return isinstance(factors, Gradient) and factors.value.numel() <= SMALL


@dataclass(frozen=True)
class Together:
    """Gradients of one dtype, side by side.

    Attributes:
        shapes: (site, operand) -> shape of its parameter, in order.
        gradients: Of all together: `[n, elements]`.
    """

    shapes: Mapping[Key, tuple[int, ...]]
    gradients: Gradient

    def squared_norms(self) -> Tensor:
        """Of all together. Shape `[n]`."""
        return squared_norms_of(self.gradients.value)

    def without(self, dropped: Tensor) -> Together:
        """Zeros in the dropped rows."""
        return Together(self.shapes, self.gradients.without(dropped))

    def weighted_sums(self, weights: Tensor) -> Iterator[tuple[Key, Tensor]]:
        """(site, operand), and the weighted sum of its gradients: each a tensor of its own."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts: Sequence[Tensor] = torch.split_with_sizes_copy(self.gradients.weighted_sum(weights), sizes)  # pyright: ignore[reportAssignmentType] (torch's stub says None)
        for (key, shape), part in zip(self.shapes.items(), parts, strict=True):
            yield key, part.view(shape)


def together(waiting: Mapping[Key, Gradient]) -> list[Together]:
    """Gradients side by side, by dtype and device."""
    alike: dict[tuple[torch.dtype, torch.device], dict[Key, Tensor]] = {}
    for key, gradient in waiting.items():
        value = gradient.value
        alike.setdefault((value.dtype, value.device), {})[key] = value
    return [
        Together({key: tuple(v.shape[1:]) for key, v in values.items()}, Gradient(torch.cat(_rows(values.values()), 1)))
        for values in alike.values()
    ]


def _rows(values: Iterable[Tensor]) -> list[Tensor]:
    return [value.reshape(len(value), math.prod(value.shape[1:])) for value in values]


__all__ = ["Together", "may_wait", "together"]
