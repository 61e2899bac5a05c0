"""One aten call, and what the rules about the example axis share.

Promises: a rule sees what was recorded and nothing else. Which arguments it asked about is noted, so that examples in
an argument that a rule overlooks are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.analysis.tags import Mixing, Unknown
from perexfx.ir.layout import Layout
from perexfx.ir.schemas import all_arguments, names_written


@dataclass(frozen=True)
class Opaque:
    """In place of a layout: a result that reads examples and that nothing which carries examples may read."""


OPAQUE: Final = Opaque()


Followed = Layout | Opaque | None


Result = Followed | list[Followed]


@dataclass(frozen=True)
class Counting:
    """A value that counts the examples: each entry is `step` times the number (from 0) of the example it belongs to.

    Attributes:
        layout: Which example each entry belongs to.
        step: What it counts by: 1 in `arange(B)`, T in `arange(0, B * T, T)`.
    """

    layout: Layout
    step: int = 1


@dataclass(frozen=True)
class OpCall:
    """One aten call, as recorded with fake tensors.

    Attributes:
        func: The overload called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
        layouts: Where each tensor argument carries examples, by `id`; absent where it carries none.
        n: Number of examples in the recorded run.
        counting: Tensor arguments that count the examples, by `id`.
        differing: Names of the arguments whose numbers are others for another number of examples.
        consulted: The tensors (by `id`) that a rule has asked about.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    layouts: Mapping[int, Layout]
    n: int
    counting: Mapping[int, Counting] = field(default_factory=dict)
    differing: frozenset[str] = frozenset()
    consulted: set[int] = field(default_factory=set, compare=False)

    @property
    def name(self) -> str:
        """Name of the operation without namespace and overload."""
        return self.func._schema.name.split("::")[1]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @cached_property
    def results(self) -> list[Tensor]:
        """The tensors it returned."""
        return [leaf for leaf in pytree.tree_leaves(self.result) if isinstance(leaf, Tensor)]

    @property
    def written(self) -> list[Tensor]:
        """The tensors among its arguments that it writes into."""
        writes = names_written(self.func)
        if not writes:
            return []
        leaves = pytree.tree_leaves([self.argument(name) for name in writes])
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @cached_property
    def _named(self) -> dict[str, Any]:
        """All its arguments, by their names in the operation's schema."""
        return all_arguments(self.func, self.args, self.kwargs)

    def layout(self, value: Any) -> Layout | None:
        """Where a tensor argument carries its examples."""
        self.consulted.add(id(value))
        return self.layouts.get(id(value))

    def count(self, value: Any) -> Counting | None:
        """How a tensor argument counts the examples."""
        self.consulted.add(id(value))
        return self.counting.get(id(value))

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operation's schema."""
        return self._named.get(name, default)

    def name_of(self, tensor: Tensor) -> str:
        """Name of the argument that is, or holds, a tensor."""
        for name, value in self._named.items():
            if any(leaf is tensor for leaf in pytree.tree_leaves(value)):
                return name
        return "?"


AxisRule = Callable[[OpCall], Result]


def axis_from_front(axis: int, rank: int) -> int:
    """A non-negative axis: negative ones count from the end."""
    return axis + rank if axis < 0 else axis


def axes_of(axes: int | Sequence[int] | None, rank: int) -> set[int]:
    """An argument `dim` as axes from the front; None and `[]` mean all of them."""
    if axes is None or (not isinstance(axes, int) and len(axes) == 0):
        return set(range(rank))
    return {axis_from_front(axis, rank) for axis in ([axes] if isinstance(axes, int) else axes)}


def at_axis(layout: Layout, axis: int) -> Layout:
    """The layout on another axis."""
    return Layout(axis, layout.before, layout.after)


def from_right(layout: Layout, rank: int, result_rank: int) -> Layout:
    """The layout of a value of some rank, in a result that it is broadcast to."""
    return at_axis(layout, layout.axis - rank + result_rank)


def without_axes(layout: Layout, axes: set[int]) -> Layout:
    """The layout after other axes are gone."""
    return at_axis(layout, layout.axis - sum(axis < layout.axis for axis in axes))


def agree(layouts: Sequence[Layout | None]) -> Layout | None:
    """The one layout that all values with examples share. Raises: Mixing where there are several."""
    found = {layout for layout in layouts if layout is not None}
    if len(found) > 1:
        described = "; ".join(sorted(str(layout) for layout in found))
        raise Mixing(f"it combines values that carry their examples differently ({described})")
    return found.pop() if found else None


def refused(error: type[Exception], why: str) -> AxisRule:
    """A rule that refuses."""

    def rule(call: OpCall) -> Result:
        raise error(why)

    return rule


__all__ = [
    "OPAQUE",
    "AxisRule",
    "Counting",
    "Followed",
    "Mixing",
    "OpCall",
    "Opaque",
    "Result",
    "Unknown",
    "agree",
    "at_axis",
    "axes_of",
    "axis_from_front",
    "from_right",
    "refused",
    "without_axes",
]
