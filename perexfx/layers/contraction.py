"""Products with a raw parameter: `matmul`, `mm`, `bmm`, `mv`, `addmm`, `baddbmm`, `einsum`.

A product of two values is an einsum of two factors, and so is its per-example gradient: axes are labeled, and each
label of the parameter is a group (also in input and output), an input feature (also in the input) or an output feature.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.factors import Factors, Gradient, GradientSignature, Product, ProductSignature, Signature
from perexfx.ir.layout import Layout
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule, Shape, Target
from perexfx.layers.elementwise import reduce_to, sum_to

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Axes:
    """The labels of a product's axes; axes of size 1 that broadcast have none ("")."""

    left: Labels
    right: Labels
    out: Labels

    def of(self, name: str) -> Labels:
        """The labels of one side."""
        return self.left if name == "left" else self.right


def _other(name: str) -> str:
    return "right" if name == "left" else "left"


def matmul_axes(left_rank: int, right_rank: int) -> Axes:
    """Of `torch.matmul` for arguments of these ranks."""

    def batch(rank: int) -> Labels:
        return tuple(string.ascii_uppercase[at] for at in range(rank - 3, -1, -1))

    left = (*batch(left_rank), "m", "k") if left_rank > 1 else ("k",)
    right = (*batch(right_rank), "k", "n") if right_rank > 1 else ("k",)
    rows, columns = ("m",) * (left_rank > 1), ("n",) * (right_rank > 1)
    return Axes(left, right, (*batch(max(left_rank, right_rank)), *rows, *columns))


def einsum_axes(equation: str, left_rank: int, right_rank: int) -> Axes | None:
    """Of an einsum of two operands; None where an operand repeats a label or the equation is not plain."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    dots = [rank - len(term.replace("...", "")) for term, rank in zip(terms, (left_rank, right_rank), strict=True)]
    spread = tuple(f"...{at}" for at in range(max(dots) - 1, -1, -1))  # counted from the right, as they broadcast

    def labels(term: str, count: int) -> Labels:
        before, ellipsis, after = term.partition("...")
        return (*before, *(spread[len(spread) - count :] if ellipsis else ()), *after)

    left, right = labels(terms[0], dots[0]), labels(terms[1], dots[1])
    if not arrow:
        letters = sorted(label for label in {*left, *right} if len(label) == 1 and (left + right).count(label) == 1)
        output = ("..." if spread else "") + "".join(letters)
    found = Axes(left, right, labels(output, len(spread)))
    repeats = any(len(set(term)) != len(term) for term in (left, right, found.out))
    return None if repeats or (len(left), len(right)) != (left_rank, right_rank) else found


def _without_broadcast(axes: Axes, shapes: Mapping[str, Shape], out: Shape) -> Axes:
    """Axes of size 1 that the other side spreads lose their label."""
    sizes = dict(zip(axes.out, out, strict=True))

    def kept(name: str) -> Labels:
        return tuple(
            "" if size == 1 and sizes.get(label, 1) != 1 else label
            for label, size in zip(axes.of(name), shapes[name], strict=True)
        )

    return Axes(kept("left"), kept("right"), axes.out)


def _without_example(axes: Axes, operand: str, example: str, shape: Shape) -> Axes:
    """A parameter's axis of size 1 along the examples loses its label, for a batch of one too."""
    labels = zip(axes.of(operand), shape, strict=True)
    kept = tuple("" if label == example and size == 1 else label for label, size in labels)
    return replace(axes, left=kept) if operand == "left" else replace(axes, right=kept)


@dataclass(frozen=True)
class _Roles:
    """What each label of the parameter is, and how the factors must be turned.

    Attributes:
        groups: Labels of parameter, input and output.
        inner: Labels of parameter and input.
        outer: Labels of parameter and output.
        positions: Labels of input and output, but the examples'.
        swapped: Whether the parameter has its inner labels before the outer ones, so that the factors change sides.
        axes: The parameter's axes in the order of groups, outer and inner (or inner and outer) labels.
    """

    groups: Labels
    inner: Labels
    outer: Labels
    positions: Labels
    swapped: bool
    axes: tuple[int, ...]


def _roles(axes: Axes, operand: str, example: str) -> _Roles | str:
    """The roles of all labels, or why they have none."""
    parameter, x = axes.of(operand), axes.of(_other(operand))
    own = tuple(label for label in parameter if label)
    groups = tuple(label for label in own if label in x and label in axes.out)
    inner = tuple(label for label in own if label in x and label not in axes.out)
    outer = tuple(label for label in own if label not in x and label in axes.out)
    positions = tuple(label for label in x if label in axes.out and label not in own and label != example)
    if len(groups) + len(inner) + len(outer) != len(own):
        return "it sums its parameter over an axis that nothing else has"
    if any(label and label not in axes.out and label not in own for label in x):
        return "it sums its input over an axis that its parameter does not have"
    if example in own:
        return "its parameter has an axis along the examples"
    swapped = own == (*groups, *inner, *outer)
    order = (*groups, *inner, *outer) if swapped else (*groups, *outer, *inner)
    unlabeled = [axis for axis, label in enumerate(parameter) if not label]
    turned = (*(parameter.index(label) for label in order), *unlabeled)
    in_order = turned == tuple(range(len(parameter)))
    return _Roles(groups, inner, outer, positions, swapped, () if in_order else turned)


def _arranged(value: Tensor, layout: Layout, labels: Labels, wanted: Sequence[Labels]) -> Tensor:
    """`value` as `[n, *wanted]`, each group of labels merged into one axis; positions take in the layout's repeats."""
    first = layout.examples_first(value)  # [n, repeats, *other axes]
    others = [label for axis, label in enumerate(labels) if axis != layout.axis]
    at = {label: axis for axis, label in enumerate(others, start=2) if label}
    order = [0, *(axis for group in wanted for axis in _axes_of(group, at))]
    broadcast = [axis for axis in range(first.dim()) if axis not in order]
    sizes = [math.prod(first.shape[axis] for axis in _axes_of(group, at)) for group in wanted]
    return first.permute(*order, *broadcast).reshape(first.shape[0], *sizes)


_REPEATS = "repeats"


def _axes_of(group: Labels, at: Mapping[str, int]) -> list[int]:
    return [1 if label == _REPEATS else at[label] for label in group]


def _two(left: Any, right: Any) -> dict[str, Any]:
    return {"left": left, "right": right}


def _three(addend: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> dict[str, Any]:
    return {"addend": addend, "left": left, "right": right, "beta": beta, "alpha": alpha}


@dataclass(frozen=True)
class Contraction(Rule):
    """A product of a value with a parameter: `n g t i, n g t o -> n g o i`."""

    kind: str
    targets: Sequence[Target]
    operands = ("right", "left", "addend")
    inputs = ("left", "right", "addend")

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The two factors, whatever torch calls them."""
        names = {"input": "left", "self": "left", "other": "right", "mat2": "right", "vec": "right"}
        return _two(*args, **{names.get(key, key): value for key, value in kwargs.items()})

    def axes(self, arguments: Arguments, shapes: Mapping[str, Shape]) -> Axes | None:
        """The labels of all axes."""
        return matmul_axes(len(shapes["left"]), len(shapes["right"]))

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Sums over one factor alone, repeated labels."""
        found = self._plan(arguments, geometry)
        return found if isinstance(found, str) else None

    def _plan(self, arguments: Arguments, geometry: Geometry) -> tuple[Axes, str, _Roles | None] | str:
        """Labels, the operand that is a parameter, and its roles; None where both sides carry examples."""
        axes = self.axes(arguments, geometry.shapes)
        if axes is None:
            return "its equation repeats a label, or has another form than two operands"
        axes = _without_broadcast(axes, geometry.shapes, geometry.output_shape)
        carrying = [name for name in ("left", "right") if name in geometry.layouts]
        if len(carrying) != 1:
            return (axes, "", None) if carrying else "none of its factors carries examples"
        layout, out = geometry.layouts[carrying[0]], geometry.output_layout
        operand = _other(carrying[0])
        example = axes.of(carrying[0])[layout.axis]
        axes = _without_example(axes, operand, example, geometry.shapes[operand])
        if axes.out[out.axis] != example or (layout.before, layout.after) != (out.before, out.after):
            return "its result carries the examples differently than its input"
        roles = _roles(axes, operand, example)
        return roles if isinstance(roles, str) else (axes, operand, roles)

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """A product for the factor that is a parameter; the addend's gradients at hand."""
        found: dict[str, Signature] = {}
        planned = self._plan(arguments, geometry)
        assert not isinstance(planned, str)
        axes, operand, roles = planned
        if roles is not None:
            size = dict(zip(axes.of(operand), geometry.shapes[operand], strict=True))
            size |= dict(zip(axes.out, geometry.output_shape, strict=True))
            g, i, o, t = (
                math.prod(size[label] for label in labels)
                for labels in (roles.groups, roles.inner, roles.outer, roles.positions)
            )
            t *= geometry.output_layout.repeats
            i, o = (o, i) if roles.swapped else (i, o)
            found[operand] = ProductSignature(geometry.n, g, t, i, o, geometry.shapes[operand])
        if "addend" in geometry.shapes and "addend" not in geometry.layouts:
            found["addend"] = GradientSignature(geometry.n, geometry.shapes["addend"])
        return found

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary product."""
        return torch.matmul(arguments["left"], arguments["right"]), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """Each factor for the gradient of the other."""
        wanted = {*inputs, *operands}
        return [name for name in ("left", "right") if _other(name) in wanted]

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The other factor times the gradient of the result, contracted."""
        planned = self._plan(call.arguments, call.geometry)
        assert not isinstance(planned, str)
        axes, operand, roles = planned
        g = call.grad_output
        alpha, beta = call.arguments.get("alpha", 1), call.arguments.get("beta", 1)
        scaled = g if alpha == 1 else g * alpha
        gradients = {
            name: _input_gradient(axes, name, scaled, call.arguments[_other(name)], call.geometry.shapes[name])
            for name in ("left", "right")
            if name in call.inputs
        }
        factors: dict[str, Factors] = {}
        if roles is not None and operand in call.operands:
            factors[operand] = _factor(axes, operand, roles, scaled, call)
        if "addend" in call.inputs:
            gradients["addend"] = sum_to(g if beta == 1 else g * beta, call.geometry.shapes["addend"])
        if "addend" in call.operands:
            reduced = reduce_to(g, call.geometry.output_layout, call.geometry.shapes["addend"])
            factors["addend"] = Gradient(reduced if beta == 1 else reduced * beta)
        return gradients, factors


def _factor(axes: Axes, operand: str, roles: _Roles, grad_output: Tensor, call: Backward) -> Product:
    name, geometry = _other(operand), call.geometry
    positions = (_REPEATS, *roles.positions)
    x = _arranged(call.arguments[name], geometry.layouts[name], axes.of(name), (roles.groups, positions, roles.inner))
    g = _arranged(grad_output, geometry.output_layout, axes.out, (roles.groups, positions, roles.outer))
    left, right = (g, x) if roles.swapped else (x, g)
    return Product(left, right, geometry.shapes[operand], roles.axes)


def _input_gradient(axes: Axes, name: str, grad_output: Tensor, other: Tensor, shape: Shape) -> Tensor:
    """The gradient of one factor: the other factor times the gradient of the result."""
    own, theirs = axes.of(name), axes.of(_other(name))
    letters = {label: at for at, label in enumerate(dict.fromkeys((*own, *theirs, *axes.out))) if label}
    kept = [at for at, label in enumerate(theirs) if label]
    other = other.reshape([other.shape[at] for at in kept])
    numbers = [letters[theirs[at]] for at in kept]
    wanted = [letters[label] for label in own if label]
    found = torch.einsum(grad_output, [letters[label] for label in axes.out], other, numbers, wanted)
    return found.reshape(shape)


@dataclass(frozen=True)
class AddedContraction(Contraction):
    """`beta * addend + alpha * (left @ right)`."""

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, whatever torch calls them."""
        names = {"input": "addend", "self": "addend"}
        names |= {"mat1": "left", "batch1": "left", "mat": "left", "mat2": "right", "batch2": "right", "vec": "right"}
        return _three(*args, **{names.get(key, key): value for key, value in kwargs.items()})

    def refuses(self, arguments: Arguments) -> str | None:
        """Factors that are computed in the graph."""
        if any(isinstance(arguments[name], torch.fx.Node) for name in ("alpha", "beta")):
            return "its alpha and beta must be constant"
        return None

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary product, in one call."""
        addend, left, right = (arguments[name] for name in ("addend", "left", "right"))
        function = {1: torch.addmv, 2: torch.addmm, 3: torch.baddbmm}[right.dim()]
        return function(addend, left, right, beta=arguments["beta"], alpha=arguments["alpha"]), ()


@dataclass(frozen=True)
class Einsum(Contraction):
    """`einsum` of two operands."""

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The equation and its operands, given one by one or as a list."""
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
        if not isinstance(equation, str) or len(operands) != 2 or kwargs.keys() - {"path"}:
            raise TypeError("it should have an equation and two operands")
        return {"equation": equation, "left": operands[0], "right": operands[1]}

    def axes(self, arguments: Arguments, shapes: Mapping[str, Shape]) -> Axes | None:
        """The labels of the equation."""
        return einsum_axes(arguments["equation"], len(shapes["left"]), len(shapes["right"]))

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary einsum."""
        return torch.einsum(arguments["equation"], arguments["left"], arguments["right"]), ()


CONTRACTIONS = (
    Contraction("matmul", (operator.matmul, torch.matmul, "matmul", torch.mm, "mm", torch.bmm, "bmm", torch.mv, "mv")),
    AddedContraction("addmm", (torch.addmm, "addmm", torch.baddbmm, "baddbmm", torch.addmv, "addmv")),
    Einsum("einsum", (torch.einsum,)),
)
