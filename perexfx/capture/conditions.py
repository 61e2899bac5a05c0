"""Conditions: what must hold of a call's inputs, where a captured graph does not hold for all.

Promises: a call that breaks a condition raises before anything is computed, and says which one and what to do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.errors import ArgumentError

Bounds = tuple[int, float]
"""Least and greatest size of an axis."""


@dataclass(frozen=True)
class Conditions:
    """The inputs that a captured graph holds for; by default all.

    Attributes:
        sizes: Tensor argument -> the bounds of each axis' size.
        guards: Relations between sizes, as `torch.export` writes them: Python expressions of `L['leaves']`, the tensor
            arguments in the order of `sizes`.
        batch_dim: The example axis of the inputs.
        carriers: Names of the tensors that carry examples.
        single: Why it does not hold for a batch of one; "" where it does.
    """

    sizes: Mapping[str, tuple[Bounds, ...]] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    batch_dim: int = 0
    carriers: frozenset[str] = frozenset()
    single: str = ""

    def check(self, leaves: Mapping[str, Any]) -> None:
        """Compares a call's inputs with what the graph holds for.

        Args:
            leaves: Of the forward's arguments, by name.

        Raises:
            ArgumentError: The graph does not hold for them.
        """
        for name, bounds in self.sizes.items():
            value = leaves.get(name)
            if not isinstance(value, Tensor):
                raise ArgumentError(
                    f"Argument `{name}` was a tensor when the model was transformed, and the captured graph holds for "
                    f"that alone. Found {type(value).__name__}. {_AGAIN}"
                )
            self._check_sizes(name, bounds, tuple(value.shape))
        if guard := self.broken_guard(leaves):
            raise ArgumentError(f"The captured graph holds for inputs with `{guard}` alone. {_AGAIN}")

    def broken_guard(self, leaves: Mapping[str, Any]) -> str:
        """The first relation that does not hold, in the arguments' own names; "" where all do.

        `torch.export` takes sizes below two apart, and says so in relations as well. Batches of one have an export of
        their own to compare with (`single`), so that relations are asked of a batch of two in their stead.
        """
        given = [self._of_two(name, leaves[name]) for name in self.sizes] if self.guards else []
        for guard in self.guards:
            if not eval(guard, {"L": {"leaves": given}}):
                return re.sub(r"L\['leaves'\]\[(\d+)\]", lambda found: list(self.sizes)[int(found[1])], guard)
        return ""

    def _of_two(self, name: str, value: Tensor) -> Tensor:
        """A tensor of such a shape, with two examples instead of fewer."""
        axis, shape = self.batch_dim, value.shape
        if name not in self.carriers or shape[axis] >= 2:
            return value
        return torch.empty((*shape[:axis], 2, *shape[axis + 1 :]), device="meta")

    def _check_sizes(self, name: str, bounds: tuple[Bounds, ...], found: tuple[int, ...]) -> None:
        fits = len(found) == len(bounds)
        for axis, (size, (low, high)) in enumerate(zip(found, bounds, strict=False)):
            is_examples = axis == self.batch_dim and name in self.carriers
            if is_examples and size == 1 and self.single:
                raise ArgumentError(f"The captured graph does not hold for a batch of one: {self.single}. {_AGAIN}")
            fits = fits and size <= high and (size >= low or (is_examples and low <= 2))
        if not fits:
            raise ArgumentError(
                f"Argument `{name}` should be of shape [{', '.join(map(_in_words, bounds))}], which the captured graph "
                f"holds for. Found {list(found)}. {_AGAIN}"
            )


def _in_words(bounds: Bounds) -> str:
    low, high = bounds
    if low == high:
        return str(low)
    return f"{low} or more" if math.isinf(high) else f"{low} to {high}"


_AGAIN = "Transform, or rewrite, the model again, with `example_inputs` like these."
