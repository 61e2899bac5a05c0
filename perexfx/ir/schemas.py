"""Calls of torch's operations by their schemas: an argument has one name, however it was passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def arguments_by_name(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call passes, in order; an argument that it leaves to its default is missing.

    Args:
        operation: An overload, as `torch.ops.aten.add.Tensor`.
        args: By place.
        kwargs: By name.
    """
    names = [argument.name for argument in operation._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def all_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same with defaults, in the order of the schema."""
    given = arguments_by_name(operation, args, kwargs)
    return {
        argument.name: given.get(argument.name, argument.default_value)
        for argument in operation._schema.arguments
        if argument.name in given or argument.has_default_value()
    }


def names_written(operation: Any) -> list[str]:
    """The arguments that an operation writes into."""
    schema = operation._schema
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
