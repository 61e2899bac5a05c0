"""Row lengths: what squares of a gradient count, where a parameter expression is a linear map with orthogonal rows.

Promises: for an expression `v = L w + c` that is understood here, no element of a parameter reaches two elements of
`v`, so that `L L^T` is diagonal; its diagonal is a product of one vector for each axis. Selections, moves, scalings by
constants, concatenations and sums of disjoint parts are; all else is left to be pulled back example by example.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from perexfx.ir.errors import ShapeError
from perexfx.ir.site import RowLengths
from perexfx.kernels.pooled import mean_of_sides, pooled_kernel, spread_kernel, spread_mean, taps_of_each

Shape = tuple[int, ...]


SMALLEST = 1e-8
"""Numbers that are smaller, or larger than one over this, leave the range of squares in float32 too easily."""


@dataclass(frozen=True)
class _Rows:
    """Lengths of the rows of a map: a product of numbers, constants, and a vector for some axes.

    Attributes:
        number: Of all rows.
        constants: Nodes (of the graph that is being written) of scalars.
        vectors: Axis -> node of a vector.
    """

    number: float = 1.0
    constants: tuple[fx.Node, ...] = ()
    vectors: Mapping[int, fx.Node] = field(default_factory=dict)

    @property
    def is_unit(self) -> bool:
        """Whether all rows have length one."""
        return self.number == 1 and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether a number says it all."""
        return not self.constants and not self.vectors


def row_lengths(
    value: fx.Node,
    inside: Sequence[fx.Node],
    parameters: Sequence[fx.Node],
    constants: Sequence[fx.Node],
    shape_of: Callable[[fx.Node], Shape | None],
) -> RowLengths | None:
    """The squared lengths of an expression's rows; None where they are not known to be orthogonal.

    Args:
        value: The node of the expression's value.
        inside: The nodes between its parameters and it, itself included, in graph order.
        parameters: What it is made of.
        constants: What it reads besides.
        shape_of: Shape of a node's value, where that is known.
    """
    if not _is_read_once(inside, parameters):
        return None
    reader = _Reader(parameters, constants, shape_of)
    for node in inside:
        found = reader.rows_of(node)
        if found is None:
            return None
        reader.rows[node] = found
    return reader.written(reader.rows[value])


def transpose_of(value: fx.Node, constants: Sequence[fx.Node]) -> fx.GraphModule | None:
    """The transpose of an expression as a function `(gradient, *constants)`: of one that only pools a kernel.

    Args:
        value: The node of the expression's value.
        constants: What it reads besides its parameters.
    """
    transposed = {pooled_kernel: spread_kernel, mean_of_sides: spread_mean}.get(value.target)  # pyright: ignore[reportArgumentType]
    weight = value.args[0] if value.args else None
    if transposed is None or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    graph = fx.Graph()
    gradient = graph.placeholder("gradient")
    given = {node: graph.placeholder(node.name) for node in constants}
    how = fx.map_arg(value.args[1:], given.__getitem__)
    graph.output(graph.call_function(transposed, (gradient, *how)))
    return fx.GraphModule({}, graph, class_name="Transpose")


def _is_read_once(inside: Sequence[fx.Node], parameters: Sequence[fx.Node]) -> bool:
    """Whether every value on the way goes into one other, or several places of one are taken, each once."""
    for node in (*parameters, *inside[:-1]):
        users = [user for user in node.users if user in inside]
        taken = [user.args[1] for user in users if user.target is operator.getitem and user.args[0] is node]
        reads = sum(_reads(user, node) for user in users)
        are_different = len(taken) == reads and all(type(at) is int and at >= 0 for at in taken)
        if reads != 1 and not (_makes_several(node) and are_different and len(set(taken)) == reads):
            return False
    return True


def _reads(user: fx.Node, node: fx.Node) -> int:
    """How many times a node reads another."""
    found = 0

    def count(read: fx.Node) -> fx.Node:
        nonlocal found
        found += read is node
        return read

    fx.map_arg((user.args, user.kwargs), count)
    return found


def _makes_several(node: fx.Node) -> bool:
    return _name(node) in ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")


def _name(node: fx.Node) -> str:
    """Of a method of tensors, or of a function of torch's or an operator; "" of others that are called alike."""
    if isinstance(node.target, str):
        return node.target if node.op == "call_method" else ""
    name = getattr(node.target, "__name__", "")
    known = (getattr(owner, name, None) for owner in (torch, F, operator))
    return name if node.op == "call_function" and any(node.target is function for function in known) else ""


_MOVES = frozenset(
    "t transpose permute view reshape flatten unflatten unsqueeze squeeze contiguous clone movedim moveaxis swapaxes "
    "swapdims narrow select chunk split unbind view_as reshape_as flip roll fliplr flipud tensor_split "
    "split_with_sizes".split()
)
"""Move every element of their input to one place, or nowhere."""


class _Reader:
    """Goes through an expression, and writes the graph that computes the lengths."""

    def __init__(
        self, parameters: Sequence[fx.Node], constants: Sequence[fx.Node], shape_of: Callable[[fx.Node], Shape | None]
    ) -> None:
        self.graph = fx.Graph()
        self.inputs = {node: self.graph.placeholder(node.name) for node in (*parameters, *constants)}
        self.first, self.constants, self.shape_of = parameters[0], set(constants), shape_of
        self.rows: dict[fx.Node, _Rows] = {node: _Rows() for node in parameters}
        self.shapes: dict[fx.Node, Shape] = {}  # of constants that say nothing but by their shape

    def written(self, rows: _Rows) -> RowLengths | None:
        """The lengths as a function `(*parameters, *constants) -> (scale, *vectors)`."""
        if rows.is_unit and not self.shapes:
            return RowLengths((), None)
        if rows.number and not SMALLEST <= rows.number <= 1 / SMALLEST:
            return None
        for node, shape in self.shapes.items():
            self.graph.call_function(check_shape, (self.inputs[node], shape))
        scale = self.graph.call_function(_scalar, (self.inputs[self.first], rows.number))
        for node in rows.constants:
            scale = self.graph.call_function(operator.mul, (scale, node))
        axes = tuple(sorted(rows.vectors))
        self.graph.output((scale, *(rows.vectors[axis] for axis in axes)))
        return RowLengths(axes, fx.GraphModule({}, self.graph, class_name="RowLengths"))

    def rows_of(self, node: fx.Node) -> _Rows | None:
        """What one operation makes of the lengths; None where it is not understood."""
        if node.op not in ("call_function", "call_method"):
            return None
        name, read = _name(node), [n for n in node.all_input_nodes if n in self.rows]
        if len(read) > 1:
            return self._of_several(node, name, read)
        (source,) = read
        rows = self.rows[source]
        if node.target is pooled_kernel:
            return self._pooled(node, rows)
        if self._moves(node, name):
            return rows if not rows.vectors and node.args[0] is source else None
        if name == "neg":
            return rows
        if name in ("add", "sub", "iadd", "isub"):
            is_plain = len(node.args) == 2 and not node.kwargs
            return rows if is_plain and self._keeps_shape(node, source) else None
        if name in ("mul", "imul", "truediv", "div", "itruediv"):
            return self._scaled(node, source, rows, divides="div" in name)
        if name in ("sum", "mean") and node.args and node.args[0] is source:
            return self._added_up(node, source, rows, name)
        return None

    def _moves(self, node: fx.Node, name: str) -> bool:
        if node.target is operator.getitem:
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            return all(isinstance(part, int | slice | type(...) | None) for part in index)
        if node.target is getattr:
            return node.args[1] in ("T", "mT", "H", "mH")
        return name in _MOVES

    def _keeps_shape(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether nothing is repeated: a broadcast would be."""
        if len(node.all_input_nodes) == 1 and all(isinstance(arg, int | float) or arg is source for arg in node.args):
            return True
        shape = self.shape_of(node)
        constants = [read for read in node.all_input_nodes if read is not source]
        found = {read: own for read in constants if read in self.constants and (own := self.shape_of(read)) is not None}
        if shape is None or shape != self.shape_of(source) or len(found) < len(constants):
            return False
        self.shapes |= found
        return True

    def _of_several(self, node: fx.Node, name: str, read: Sequence[fx.Node]) -> _Rows | None:
        """Concatenations, and sums of values of different parameters."""
        found = [self.rows[source] for source in read]
        if name in ("cat", "concat", "concatenate", "stack", "hstack", "vstack"):
            every = node.args[0] if node.args else None
            are_all = isinstance(every, tuple | list) and len(every) == len(read)
            return _Rows() if are_all and all(rows.is_unit for rows in found) else None
        if name in ("add", "sub", "iadd", "isub") and len(node.args) == len(read) == 2 and not node.kwargs:
            shapes = {self.shape_of(source) for source in read}
            if len(shapes) == 1 and None not in shapes and all(rows.is_plain for rows in found):
                return _Rows(math.hypot(found[0].number, found[1].number))
        return None

    def _scaled(self, node: fx.Node, source: fx.Node, rows: _Rows, *, divides: bool) -> _Rows | None:
        """Multiplied with, or divided by, a number or a constant that differs along one axis at most."""
        if len(node.args) != 2 or node.kwargs or (divides and node.args[0] is not source):
            return None
        by = node.args[1] if node.args[0] is source else node.args[0]
        if isinstance(by, int | float):
            if divides and not by:
                return None
            return replace(rows, number=abs(rows.number / by if divides else rows.number * by))
        if not isinstance(by, fx.Node) or by not in self.constants or not self._keeps_shape(node, source):
            return None
        shape, whole = self.shape_of(by), self.shape_of(source)
        if shape is None or whole is None:
            return None
        differs = [axis + len(whole) - len(shape) for axis, size in enumerate(shape) if size > 1]
        if len(differs) > 1:
            return None
        factor = self.graph.call_function(_factors, (self.inputs[by], shape, divides))
        if not differs:
            return replace(rows, constants=(*rows.constants, factor))
        known = rows.vectors.get(differs[0])
        vector = factor if known is None else self.graph.call_function(operator.mul, (known, factor))
        return replace(rows, vectors={**rows.vectors, differs[0]: vector})

    def _added_up(self, node: fx.Node, source: fx.Node, rows: _Rows, name: str) -> _Rows | None:
        before, after = self.shape_of(source), self.shape_of(node)
        if rows.vectors or before is None or after is None or "dtype" in node.kwargs:
            return None
        count = math.prod(before) // max(1, math.prod(after))
        root = math.sqrt(max(1, count))
        return replace(rows, number=rows.number * root if name == "sum" else rows.number / root)

    def _pooled(self, node: fx.Node, rows: _Rows) -> _Rows | None:
        """Taps added up: as many as go to each place."""
        _, side, slides = node.args
        assert isinstance(slides, tuple)
        assert isinstance(side, fx.Node)
        axes = range(2, 2 + len(slides))
        if rows.vectors.keys() & set(axes):
            return None
        of_axes = {axis: (self.inputs[side], slides, at) for at, axis in enumerate(axes)}
        counts = {axis: self.graph.call_function(taps_of_each, how) for axis, how in of_axes.items()}
        counts = {axis: self.graph.call_function(torch.sqrt, (count,)) for axis, count in counts.items()}
        return replace(rows, vectors={**rows.vectors, **counts})


def shapes_without_inputs(nodes: Sequence[fx.Node], module: nn.Module) -> dict[fx.Node, Shape]:
    """Shapes of values that are computed from a module's tensors and from numbers alone; nothing is computed.

    Args:
        nodes: That carry no examples, in graph order.
        module: Holds what they name.
    """
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(module)
            values[node] = torch.empty_like(held, device="meta") if isinstance(held, Tensor) else held
            continue
        if not _is_torchs(node) or not values.keys() >= set(node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # pyright: ignore[reportArgumentType]
        target: Any = getattr(args[0], node.target, None) if isinstance(node.target, str) else node.target
        with suppress(Exception), torch.no_grad():  # what fails on shapes alone has none that are known
            values[node] = target(*(args[1:] if node.op == "call_method" else args), **kwargs)
    return {node: tuple(value.shape) for node, value in values.items() if isinstance(value, Tensor)}


def _is_torchs(node: fx.Node) -> bool:
    """Whether a node calls a function of torch, or an operator, which do nothing but compute."""
    module = getattr(node.target, "__module__", None) or "torch"
    return node.op == "call_method" or (node.op == "call_function" and module.split(".")[0] in ("torch", "_operator"))


def _scalar(like: Tensor, number: float) -> Tensor:
    return torch.full((), number, dtype=torch.float64, device=like.device)


def _factors(value: Tensor, shape: Shape, divides: bool) -> Tensor:
    """Of a constant that differs along one axis at most: a vector, or a scalar, in float64.

    Raises:
        ShapeError: It has another shape than it had when the lengths were worked out.
    """
    check_shape(value, shape)
    found = value.detach().to(torch.float64).abs()
    found = 1 / found if divides else found
    return found.reshape(-1) if found.numel() > 1 else found.reshape(())


def check_shape(value: Tensor, shape: Shape) -> None:
    """Raises: ShapeError, where a constant of a parameter expression has another shape than it had."""
    if tuple(value.shape) != tuple(shape):
        raise ShapeError(
            f"A constant of a parameter expression was of shape {list(shape)} when the model was transformed. Found "
            f"{list(value.shape)}. What its gradient's norm is depends on that shape: transform the model again."
        )


__all__ = ["row_lengths", "shapes_without_inputs", "transpose_of"]
