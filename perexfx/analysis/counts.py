"""Numbers that a graph computes from sizes, known for every number of examples.

Promises: a number is known as `constant + slope * n` only where arithmetic shows it for all n; whatever fits the two
recorded batch sizes by accident (`n % 2`, `n // 64`) is not known, and no tensor may be computed from it.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from perexfx.analysis.fake_run import Run, leaves, leaves_of
from perexfx.analysis.follow import Follower


class NotKnown(Exception):  # noqa: N818
    """A number follows the number of examples in a way that is not linear, or not known."""


@dataclass(frozen=True)
class Count:
    """The number `constant + slope * n`, for n examples."""

    constant: int
    slope: int

    def at(self, n: int) -> int:
        """Its value for n examples."""
        return self.constant + self.slope * n

    def __add__(self, other: Any) -> Any:
        return _simple(self.constant + _count(other).constant, self.slope + _count(other).slope)

    def __mul__(self, other: Any) -> Any:
        factor = _count(other)
        if factor.slope:
            raise NotKnown
        return _simple(self.constant * factor.constant, self.slope * factor.constant)

    def __neg__(self) -> Any:
        return self * -1

    def __sub__(self, other: Any) -> Any:
        return self + _count(other) * -1

    def __rsub__(self, other: Any) -> Any:
        return _count(other) - self

    def __floordiv__(self, other: Any) -> Any:
        return _quotient(self, _count(other))

    def __rfloordiv__(self, other: Any) -> Any:
        return _quotient(_count(other), self)

    def __mod__(self, other: Any) -> Any:
        divisor = _count(other)
        return _count(self) - divisor * _quotient(self, divisor)  # nothing is left where the quotient is exact

    __radd__, __rmul__ = __add__, __mul__
    __truediv__, __rtruediv__ = __floordiv__, __rfloordiv__


def _count(value: Any) -> Count:
    if isinstance(value, Count):
        return value
    if isinstance(value, int):
        return Count(value, 0)
    raise NotKnown


def _simple(constant: int, slope: int) -> Count | int:
    return Count(constant, slope) if slope else constant


def _quotient(dividend: Count, divisor: Count) -> Count | int:
    """An exact quotient: by a number that divides both parts, or of proportional counts."""
    if divisor.slope == 0 and divisor.constant and not (dividend.constant % divisor.constant):
        if dividend.slope % divisor.constant == 0:
            return _simple(dividend.constant // divisor.constant, dividend.slope // divisor.constant)
    elif divisor.slope and dividend.slope % divisor.slope == 0:
        ratio = dividend.slope // divisor.slope
        if dividend.constant == ratio * divisor.constant:
            return ratio
    raise NotKnown


_WHOLE: tuple[Any, ...] = (int, operator.index, math.floor, math.ceil, math.trunc, round, operator.pos, torch.sym_int)
"""Functions that leave a whole number as it is."""


_ARITHMETIC: tuple[Any, ...] = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    operator.neg,
    operator.getitem,
    math.prod,
    sum,
)


def unknown_numbers(graph: fx.Graph, runs: Sequence[Run], follower: Follower) -> tuple[set[str], set[str]]:
    """Nodes with a number that follows the number of examples: all of them, and those that are not known for every one.

    Args:
        graph: In functional form.
        runs: Two recorded runs of it.
        follower: What is known about the tensors of the first.
    """
    reader = _Reader(runs, follower)
    for node in graph.nodes:
        reader.read(node)
    return reader.following, reader.unknown


class _Reader:
    """Evaluates the numbers of a graph as counts, node by node."""

    def __init__(self, runs: Sequence[Run], follower: Follower) -> None:
        self.runs, self.follower = runs, follower
        self.known: dict[fx.Node, Any] = {}
        self.following: set[str] = set()
        self.unknown: set[str] = set()

    def read(self, node: fx.Node) -> None:
        """One node: notes its value where it is of numbers, and what follows the number of examples."""
        values = [run.values[node.name] for run in self.runs]
        numbers = [[leaf for leaf in leaves(value) if isinstance(leaf, int | float)] for value in values]
        read = [n for n in node.all_input_nodes if n.name in self.following]
        if numbers[0] == numbers[1] and (not read or leaves_of(values[0])) and not self._is_size(node):
            self.known[node] = values[0]
            return
        try:
            value = self._evaluate(node)
            if not self._is_right(value, values):
                raise NotKnown
        except (NotKnown, TypeError, ValueError, AttributeError, ArithmeticError, LookupError):
            self.following.add(node.name)
            self.unknown.add(node.name)
            return
        self.known[node] = value
        if any(isinstance(leaf, Count) for leaf in pytree.tree_leaves(value)):
            self.following.add(node.name)

    def _is_size(self, node: fx.Node) -> bool:
        """Whether a node reads the size of a tensor that is not known for every number of examples."""
        read = node.args[0] if node.args else None
        tensors = leaves_of(self.runs[0].values[read.name]) if isinstance(read, fx.Node) else []
        return _size_reader(node) is not None and any(id(tensor) in self.follower.varying for tensor in tensors)

    def _evaluate(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self._value)
        reader = _size_reader(node)
        if reader is not None and isinstance(node.args[0], fx.Node):
            small, large = (run.values[node.args[0].name] for run in self.runs)
            shape = self._shape(small, large) if isinstance(small, Tensor) else args[0]
            return reader(shape, *args[1:], **node.kwargs)
        if node.target in _WHOLE:
            return _simple(_count(args[0]).constant, _count(args[0]).slope)
        if node.target in _ARITHMETIC and callable(node.target):
            return node.target(*args, **fx.map_arg(dict(node.kwargs), self._value))
        raise NotKnown

    def _value(self, node: fx.Node) -> Any:
        if node in self.known:
            return self.known[node]
        raise NotKnown

    def _shape(self, small: Tensor, large: Tensor) -> tuple[Any, ...]:
        key = id(small)
        if key in self.follower.varying:
            raise NotKnown
        counting = self.follower.counting.get(key)
        layout = counting.layout if counting is not None else self.follower.layouts.get(key)
        sizes: list[Any] = []
        for axis, (size, other) in enumerate(zip(small.shape, large.shape, strict=True)):
            if layout is not None and axis == layout.axis:
                sizes.append(Count(0, layout.repeats))
            elif size == other:
                sizes.append(size)
            else:
                raise NotKnown
        return tuple(sizes)

    def _is_right(self, value: Any, values: Sequence[Any]) -> bool:
        """Whether a value of counts gives what was recorded."""
        for run, recorded in zip(self.runs, values, strict=True):
            found = [leaf.at(run.n) if isinstance(leaf, Count) else leaf for leaf in pytree.tree_leaves(value)]
            if found != pytree.tree_leaves(recorded):
                return False
        return True


def _size_reader(node: fx.Node) -> Callable[..., Any] | None:
    """What a node makes of a tensor's shape, where it reads nothing else."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is builtins.getattr and node.args[1] == "shape":
        return lambda shape, _name: shape
    if node.target in ("size", torch.ops.aten.sym_size.int, torch.ops.aten.sym_size.default):
        return lambda shape, dim=None: shape if dim is None else shape[dim]
    if node.target in ("numel", torch.numel, torch.ops.aten.sym_numel.default):
        return math.prod
    return None
