"""Where in a value the examples are.

A value of B examples carries them on one axis of size `before * B * after`: axis 0 of `[B, C, H, W]` has
`before = after = 1`; `[B, T, D]` reshaped to `[B * T, D]` has `after = T`; `[T, B, D]` reshaped has `before = T`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The example axis of a value, and what is merged with it.

    Attributes:
        axis: The axis that runs over examples, counted from the front.
        before: How many positions are merged into the axis outside the examples (they vary slowest).
        after: How many positions are merged into the axis inside the examples (they vary fastest).
    """

    axis: int
    before: int = 1
    after: int = 1

    @property
    def repeats(self) -> int:
        """How many positions of the axis belong to each example."""
        return self.before * self.after

    def apart(self, value: Tensor) -> Tensor:
        """`value` with its example axis as three, `before`, examples and `after`: a view."""
        n = value.shape[self.axis] // self.repeats
        return value.unflatten(self.axis, (self.before, n, self.after))

    def examples_first(self, value: Tensor) -> Tensor:
        """`value` as `[n, repeats, *other axes]`: a view where torch can make one.

        Args:
            value: Any tensor with this layout.
        """
        if self.axis == 0 and self.repeats == 1:
            return value.unsqueeze(1)
        first = self.apart(value).movedim((self.axis + 1, self.axis, self.axis + 2), (0, 1, 2))
        return first.reshape(first.shape[0], self.repeats, *first.shape[3:])

    def split(self, value: Tensor) -> Tensor:
        """`value` as `[n, ...]`, where the example axis keeps its place and one example's `repeats` positions."""
        return self.apart(value).movedim(self.axis + 1, 0).flatten(self.axis + 1, self.axis + 2)

    def __str__(self) -> str:
        if self.repeats == 1:
            return f"examples on axis {self.axis}"
        return f"examples on axis {self.axis}, merged with {self.before} before and {self.after} after"
