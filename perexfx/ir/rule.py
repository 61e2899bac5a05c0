"""What a layer rule is: the mathematics of one kind of site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from perexfx.ir.factors import Factors, Signature
from perexfx.ir.layout import Layout

Shape = tuple[int, ...]
Arguments = Mapping[str, Any]
Target = Callable[..., Any] | str


@dataclass(frozen=True)
class Geometry:
    """The shapes at one site, for one kind of input.

    Attributes:
        n: Number of examples.
        shapes: Shape of each tensor argument, parameter expressions included.
        layouts: Where each argument that carries examples has them.
        output_shape: Shape of the result.
        output_layout: Where the result has its examples.
    """

    n: int
    shapes: Mapping[str, Shape]
    layouts: Mapping[str, Layout]
    output_shape: Shape
    output_layout: Layout


@dataclass(frozen=True)
class Backward:
    """What a rule's backward is given.

    Attributes:
        arguments: The arguments of the forward, by name.
        residuals: What the forward saved.
        grad_output: Gradient of the result.
        geometry: Shapes and layouts.
        inputs: Names of the arguments whose gradient autograd asks for.
        operands: Names of the trainable arguments whose factors are wanted.
    """

    arguments: Arguments
    residuals: tuple[Tensor, ...]
    grad_output: Tensor
    geometry: Geometry
    inputs: Collection[str]
    operands: Collection[str]

    def examples_first(self, name: str) -> Tensor:
        """An argument as `[n, repeats, *other axes]`."""
        return self.geometry.layouts[name].examples_first(self.arguments[name])

    @property
    def grad_output_examples_first(self) -> Tensor:
        """The gradient of the result as `[n, repeats, *other axes]`."""
        return self.geometry.output_layout.examples_first(self.grad_output)


class Rule(ABC):
    """The mathematics of one kind of site: what its per-example gradient is.

    Rules are frozen and stateless. A rule computes the layer's output, the gradient of its inputs, and the factors of
    its parameters' per-example gradients; it never computes a norm.

    Attributes:
        kind: What the report calls it.
        targets: The functions (and, as strings, tensor methods) it covers.
        operands: Names of the arguments that may be a parameter expression, the one with a choice of strategies first.
        inputs: Names of the arguments that may carry examples.
    """

    kind: str
    targets: Sequence[Target]
    operands: Sequence[str]
    inputs: Sequence[str]

    named: Callable[..., dict[str, Any]]
    """Has the signature of the covered function; returns its arguments by name."""

    def bind(self, target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name, defaults filled in. Raises: TypeError where the call does not fit."""
        return self.named(*args, **kwargs)

    def refuses(self, arguments: Arguments) -> str | None:
        """Why this call is not covered, from its constant arguments; None where it is."""
        return None

    def misfits(self, geometry: Geometry) -> str | None:
        """Why these shapes or layouts are not covered; None where they are."""
        return None

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """Names of the tensor arguments that `backward` reads; no other is kept, and later layers may overwrite those.

        Args:
            arguments: By name.
            inputs: Those whose gradient autograd will ask for.
            operands: Those whose factors will be wanted.
        """
        return arguments.keys()

    @abstractmethod
    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """The sizes of each operand's factors: what `backward` would leave, from shapes alone."""

    @abstractmethod
    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output, and the tensors its backward needs besides the arguments."""

    @abstractmethod
    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Gradients of the inputs asked for, and factors of the operands wanted."""


def sum_positions(grad_output: Tensor) -> Tensor:
    """A bias' per-example gradient: `[n, t, o]` summed over t."""
    return grad_output.squeeze(1) if grad_output.shape[1] == 1 else grad_output.sum(1)
