"""Sites: the places where parameters first meet examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from perexfx.ir.refusal import Place
from perexfx.ir.rule import Rule, Target

Key = tuple[str, str]
"""A site and an operand, by name."""


@dataclass(frozen=True)
class RowLengths:
    """Lengths of the rows of a linear map, which are orthogonal: their squares are what squares at its value count.

    Attributes:
        axes: Of the value, along which they differ.
        function: `(*parameters, *constants) -> (scale, *vectors)`, whose product they are: a scalar, and a vector for
            each axis; None where all have length one.
    """

    axes: tuple[int, ...]
    function: fx.GraphModule | None


@dataclass(frozen=True)
class Expression:
    """A value that depends on parameters and constants alone.

    Attributes:
        parameters: Names of the parameters it depends on.
        constants: Names of the graph nodes it reads besides (sizes, position ids).
        function: `(*parameters, *constants) -> value`; None where the value is the parameter itself.
        transpose: `(gradient, *constants) -> gradient of the parameter`, where it is a linear map of one parameter and
            that is known by itself; None where autograd finds it, by way of the value.
        lengths: Of its rows, where they are orthogonal: norms at its value are then norms at its parameters. None
            where that is not known.
    """

    parameters: tuple[str, ...]
    constants: tuple[str, ...] = ()
    function: fx.GraphModule | None = None
    lengths: RowLengths | None = RowLengths((), None)
    transpose: fx.GraphModule | None = None


@dataclass(frozen=True)
class Operand:
    """A trainable argument of a site.

    Attributes:
        name: Its name in the rule.
        node: The graph node of its value.
        expression: What it is made of.
    """

    name: str
    node: str
    expression: Expression


@dataclass(frozen=True)
class Site:
    """One use of parameters on examples.

    Attributes:
        name: What reports call it, and the key of `strategy={...}`: the module's path, or the parameter's name.
        rule: Its mathematics.
        target: The function or method called.
        operands: Its trainable arguments; the first has a choice of strategies.
        place: Where it is in the user's model.
        group: The sites that share parameters with it, itself included, have the same group.
    """

    name: str
    rule: Rule
    target: Target
    operands: tuple[Operand, ...]
    place: Place
    group: str

    @property
    def node(self) -> str:
        """Name of its graph node."""
        return self.place.node

    @property
    def kind(self) -> str:
        """The rule's kind."""
        return self.rule.kind

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters that meet examples here."""
        return tuple(dict.fromkeys(name for operand in self.operands for name in operand.expression.parameters))


def grouped(sites: Sequence[Site]) -> dict[str, tuple[Site, ...]]:
    """Group -> its sites; groups and sites in graph order."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site)
    return {name: tuple(members) for name, members in groups.items()}


def are_joined(members: Sequence[Site]) -> bool:
    """Whether the per-example gradients of a group must be formed and added before their norm is taken.

    They must where a parameter is used more than once, by several sites or by several operands of one, and where the
    norm of a parameter expression's gradient does not tell that of its parameters'.
    """
    operands = [operand for site in members for operand in site.operands]
    uses = Counter(name for operand in operands for name in operand.expression.parameters)
    return max(uses.values(), default=0) > 1 or not all(
        tells_norms(site, operand) for site in members for operand in site.operands
    )


def tells_norms(site: Site, operand: Operand) -> bool:
    """Whether norms at the value of an operand's expression, weighed, are norms at its parameters."""
    lengths = operand.expression.lengths
    return lengths is not None and set(lengths.axes) <= set(site.rule.weighed_axes(operand.name))
