"""The structure of an exported forward's output: containers, dataclasses, Hugging Face's output classes.

Promises: the graph returns an object of the same structure and classes, with everything in it that was there; what a
graph cannot make is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from perexfx.ir.errors import CaptureError
from perexfx.ir.node import NodeInfo, annotate


class _Leaf:
    """Stands for a tensor or a size."""

    def __init__(self, at: int) -> None:
        self.at = at


class _Made:
    """Stands for a dataclass, with its fields."""

    def __init__(self, cls: Any, fields: dict[str, Any]) -> None:
        self.cls, self.fields = cls, fields


class OutputTemplate:
    """Takes an output apart, and puts it together again in a graph."""

    def __init__(self) -> None:
        self._template: Any = None

    def flatten(self, output: Any) -> tuple[Any, ...]:
        """The tensors and sizes of an output, whose structure is remembered."""
        leaves: list[Any] = []

        def take(value: Any) -> Any:
            if isinstance(value, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
                leaves.append(value)
                return _Leaf(len(leaves) - 1)
            if value is None or isinstance(value, int | float | str | torch.dtype | torch.device):
                return value
            return _map_parts(value, take)

        self._template = take(output)
        return tuple(leaves)

    def rebuild(self, graph: fx.Graph, leaves: Sequence[Any]) -> Any:
        """The output with nodes for its tensors, and a call for each dataclass.

        Args:
            graph: Where the calls go.
            leaves: What stands for the values that `flatten` gave.
        """

        def make(value: Any) -> Any:
            if isinstance(value, _Leaf):
                return leaves[value.at]
            if isinstance(value, _Made):
                fields = {name: make(part) for name, part in value.fields.items()}
                return annotate(graph.call_function(value.cls, (), fields), NodeInfo())
            return _map_parts(value, make) if isinstance(value, list | tuple | dict) else value

        return make(self._template)


def _map_parts(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container with a function of its parts in their place."""
    kind: Any = type(value)
    if is_dataclass(value):
        return _Made(kind, {name: function(part) for name, part in vars(value).items() if part is not None})
    if kind in (list, tuple):
        return kind(function(part) for part in value)
    if kind is dict:
        return {key: function(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(function(part) for part in value))
    raise CaptureError(
        f"The forward returns a {kind.__name__}, which a graph cannot make. Return tensors, tuples, dicts or "
        "dataclasses (Hugging Face models that return a cache: pass `use_cache=False`)."
    )
