"""The forward's inputs: which tensors carry examples, how many, and all else that a plan depends on.

Promises: the same kind of input always gives an equal value, whatever its batch size; inputs that disagree about the
number of examples are an error that shows their shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ArgumentError

GivenInputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a forward as users give them: a tensor, a tuple of positional inputs, or a dict of keyword inputs."""


def bind_inputs(module: nn.Module, given: GivenInputs, argument: str) -> inspect.BoundArguments:
    """Inputs bound to the arguments of a module's forward.

    Args:
        module: Whose forward they are for.
        given: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        argument: What the caller calls them, for messages.

    Raises:
        ArgumentError: They do not fit.
    """
    signature = inspect.signature(module.forward)
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        kwargs = given
    else:
        args = given if isinstance(given, tuple) else (given,)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"`{argument}` does not fit `{type(module).__name__}.forward{signature}`: {error}. "
            "Pass a tensor, a tuple of positional inputs, or a dict of keyword inputs."
        ) from None


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The arguments by name, with those of `**kwargs` among the others."""
    found = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(parameter.name, {}))
    return found


def named_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with containers that hold tensors taken apart: `batch` becomes `batch['image']`, ..."""
    leaves: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            leaves[name] = value
        else:
            found, _ = pytree.tree_flatten_with_path(value)
            leaves.update({f"{name}{pytree.keystr(path)}": leaf for path, leaf in found})
    return leaves


def arguments_of(graph: fx.Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of a graph's placeholders, in their order."""
    targets = [str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder"]
    return {target: inputs.get(target) for target in targets}


TEMPLATE = "perexfx_template"
"""Key of the template of an argument that is a container of tensors, in its placeholder's `meta`."""


@dataclass(frozen=True)
class Template:
    """An argument that is a container of tensors.

    Attributes:
        spec: Its structure.
        names: Of its leaves.
        constants: Its leaves; None where they are tensors.
    """

    spec: pytree.TreeSpec
    names: tuple[str, ...]
    constants: tuple[Any, ...]


def arguments_for(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> list[Any]:
    """The arguments that a graph's placeholders stand for, with given tensors; those of `*args` one by one."""
    arguments: list[Any] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            value = argument_of(node, tensors)
            arguments.extend((value or ()) if str(node.target).startswith("*") else [value])
    return arguments


def argument_of(placeholder: fx.Node, tensors: Mapping[str, Any]) -> Any:
    """The argument that a placeholder stands for, with given tensors."""
    template: Template | None = placeholder.meta.get(TEMPLATE)
    if template is None:
        return tensors.get(str(placeholder.target), placeholder.args[0] if placeholder.args else None)
    leaves = [tensors.get(name, c) for name, c in zip(template.names, template.constants, strict=True)]
    return pytree.tree_unflatten(leaves, template.spec)


def batch_sizes(arguments: Mapping[str, Any], batch_dim: int) -> list[int]:
    """The sizes that the batch may have, the likeliest first: that of the first tensor; 1 only where all have it."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.dim() > batch_dim]
    sizes = list(dict.fromkeys(value.shape[batch_dim] for value in tensors))
    return sorted(sizes, key=lambda size: size == 1)


@dataclass(frozen=True)
class Inputs:
    """The shapes of one kind of input: all a plan depends on besides the batch size.

    Attributes:
        names: Of the tensors among the forward's arguments.
        shapes: With 0 in place of the batch size, where a tensor carries examples.
        dtypes: Their dtypes.
        devices: Their devices.
        carriers: Which of them carry examples.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    carriers: tuple[bool, ...]

    @property
    def carrying(self) -> frozenset[str]:
        """Names of the tensors that carry examples."""
        return frozenset(name for name, carries in zip(self.names, self.carriers, strict=True) if carries)

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        batch_dim: int,
        carriers: tuple[bool, ...] | None = None,
        examples: int | None = None,
    ) -> tuple[Inputs, int]:
        """The kind of some inputs, and their batch size.

        Args:
            arguments: The forward's arguments by name; those that are no tensors are left out.
            batch_dim: The example axis of the inputs.
            carriers: Which tensors carry examples; None: those that have as many along that axis as there are.
            examples: How many there are; None: as many as the first of `batch_sizes`.

        Raises:
            ArgumentError: No tensor has an axis `batch_dim`, or they disagree about the number of examples.
        """
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        if carriers is None or len(carriers) != len(tensors):
            size = examples if examples is not None else next(iter(batch_sizes(tensors, batch_dim)), None)
            carriers = tuple(t.dim() > batch_dim and t.shape[batch_dim] == size for t in tensors.values())
        found = {
            name: value.shape[batch_dim] if value.dim() > batch_dim else None
            for (name, value), carries in zip(tensors.items(), carriers, strict=True)
            if carries
        }
        sizes = set(found.values())
        if not sizes or None in sizes or len(sizes) > 1:
            shapes = ", ".join(f"`{name}` of shape {list(value.shape)}" for name, value in tensors.items())
            others = ", ".join(
                f"`{name}` of type {type(value).__name__}" for name, value in arguments.items() if name not in tensors
            )
            problem = "disagree about the number of examples" if len(sizes) > 1 else "have no axis for the examples"
            raise ArgumentError(
                f"The inputs {problem} on axis {batch_dim}. Found {'; '.join(filter(None, (shapes, others)))}. "
                "Pass tensors with the examples on the axis that `batch_dim` names."
            )
        shapes = tuple(
            (*t.shape[:batch_dim], 0, *t.shape[batch_dim + 1 :]) if carries else tuple(t.shape)
            for t, carries in zip(tensors.values(), carriers, strict=True)
        )
        dtypes, devices = tuple(t.dtype for t in tensors.values()), tuple(t.device for t in tensors.values())
        (n,) = sizes
        assert n is not None
        return cls(tuple(tensors), shapes, dtypes, devices, carriers), n
