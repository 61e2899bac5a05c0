"""What a layer rule is: the mathematics of one kind of site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from perexfx.ir.cost import Work
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.layout import Layout

Shape = tuple[int, ...]
Arguments = Mapping[str, Any]
Target = Callable[..., Any] | str


@dataclass(frozen=True)
class Output:
    """One tensor that a site returns.

    Attributes:
        shape: Its shape.
        layout: Where it has its examples; None where it carries none.
        is_floating: Whether it can have a gradient.
    """

    shape: Shape
    layout: Layout | None
    is_floating: bool = True


@dataclass(frozen=True)
class Geometry:
    """The shapes at one site, for one kind of input.

    Attributes:
        n: Number of examples.
        shapes: Shape of each tensor argument, parameter expressions included.
        layouts: Where each argument that carries examples has them.
        outputs: The tensors it returns, in pytree order; most sites return one.
        for_one: Arguments that are numbers and depend on the batch size: what they are for one example.
    """

    n: int
    shapes: Mapping[str, Shape]
    layouts: Mapping[str, Layout]
    outputs: tuple[Output, ...]
    for_one: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_shape(self) -> Shape:
        """Shape of the first result."""
        return self.outputs[0].shape

    @property
    def output_layout(self) -> Layout:
        """Where the first result has its examples."""
        layout = self.outputs[0].layout
        assert layout is not None
        return layout


@dataclass(frozen=True)
class Fitted:
    """A site at known shapes.

    Attributes:
        rule: That covers them: the site's own, or the fallback.
        geometry: The shapes.
        signatures: Operand -> sizes of its factors.
        misfit: Why the site's own rule does not cover them; "" where it does.
        shares: Name and sizes of the value that it and other sites read, as the left factor of a product; "" where it
            is alone.
    """

    rule: Rule
    geometry: Geometry
    signatures: Mapping[str, Signature]
    misfit: str = ""
    shares: str = ""


@dataclass(frozen=True)
class Backward:
    """What a rule's backward is given.

    Attributes:
        arguments: The arguments of the forward, by name.
        residuals: What the forward saved.
        grad_outputs: Gradients of the results, in pytree order.
        geometry: Shapes and layouts.
        inputs: Names of the arguments whose gradient autograd asks for.
        operands: Names of the trainable arguments whose factors are wanted.
    """

    arguments: Arguments
    residuals: tuple[Tensor, ...]
    grad_outputs: tuple[Tensor, ...]
    geometry: Geometry
    inputs: Collection[str]
    operands: Collection[str]

    @property
    def grad_output(self) -> Tensor:
        """Gradient of the first result."""
        return self.grad_outputs[0]

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

    def operands_of(self, arguments: Arguments) -> Sequence[str]:
        """Names of the arguments of one call that may be a parameter expression."""
        return [name for name in self.operands if name in arguments]

    def refuses(self, arguments: Arguments) -> str | None:
        """Why this call is not covered, from its constant arguments; None where it is."""
        return None

    def misfits(self, arguments: Arguments, geometry: Geometry) -> str | None:
        """Why these shapes or layouts are not covered, so that the fallback must be; None where they are."""
        return None

    def weighed_axes(self, operand: str) -> Collection[int]:
        """Axes of an operand along which squares of its gradient may be made to count differently.

        They may where a strategy gets to know of it (`perexfx.ir.weighed`): along the features of a matrix, along the
        channels and taps of a kernel, along all axes of gradients at hand. By default along none.
        """
        return ()

    def own_work(self, geometry: Geometry, itemsize: int) -> tuple[Work, ...]:
        """What `backward` does beyond an ordinary backward, for the plan."""
        return ()

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
    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The layer's output (a tensor, or a pytree of them), and what its backward needs besides the arguments."""

    @abstractmethod
    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Gradients of the inputs asked for, and factors of the operands wanted."""


@dataclass(frozen=True)
class Wrapped(Rule):
    """A rule that does what another does: the base of those that watch one at work."""

    rule: Rule

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """The rule's own."""
        return self.rule.signatures(arguments, geometry)

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """The rule's own."""
        return self.rule.reads(arguments, inputs, operands)

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Any, tuple[Tensor, ...]]:
        """The rule's own."""
        return self.rule.forward(arguments, geometry)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The rule's own."""
        return self.rule.backward(call)


def sum_positions(grad_output: Tensor) -> Tensor:
    """A bias' per-example gradient: `[n, t, o]` summed over t."""
    return grad_output.squeeze(1) if grad_output.shape[1] == 1 else grad_output.sum(1)
