"""The transformed module: a GraphModule that survives what people do with modules.

Promises: copies, pickles and `torch.save` keep every attribute of the module that it was made from; `torch.compile`
leaves its forward alone.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import fx

from perexfx.runtime.face import PerExample, runtime_of

FACE = "perexfx"
"""Name of the attribute that a transformed module has beside those of the model."""


def _overload(name: str, overload: str) -> Any:
    """An overload by its name: `aten::silu`, `default`."""
    namespace, operation = name.split("::")
    return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


# torch cannot pickle overloads, and exported graphs name them
copyreg.pickle(torch._ops.OpOverload, lambda op: (_overload, (op._schema.name, op._overloadname)))


class Transformed(fx.GraphModule):
    """A GraphModule with every attribute of the module it was made from.

    fx itself keeps only what the graph names, and loses the rest when it copies or saves.
    """

    perexfx: PerExample

    def __init__(self, body: Mapping[str, Any], graph: fx.Graph, class_name: str = "Transformed") -> None:
        super().__init__({}, fx.Graph(), class_name)
        for name, value in body.items():
            self.__dict__[name] = value
        self.graph = graph
        runtime_of(self).belongs_to(self)

    def recompile(self) -> Any:
        """Keeps torch.compile out of the forward: it would lose what the nodes leave for the backward."""
        code = super().recompile()
        if FACE in self._modules:
            runtime_of(self).notes.clear()  # they were of another graph
        cls: Any = type(self)
        cls.forward = _uncompiled(cls.forward)
        return code

    def _body(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_graph", "_code", "_tracer_cls")}

    def __reduce__(self) -> Any:
        graph = copy.deepcopy(self.graph)  # without its link back to this module
        return _rebuild, (self._body(), graph, type(self).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Transformed:
        copied = _rebuild(copy.deepcopy(self._body(), memo), copy.deepcopy(self.graph), type(self).__name__)
        memo[id(self)] = copied
        return copied


def _uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs eagerly inside of torch.compile, whose machinery is loaded when it is first called."""
    disabled: list[Callable[..., Any]] = []

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(forward))
        return disabled[0](*args, **kwargs)

    return call


def _rebuild(body: Mapping[str, Any], graph: fx.Graph, class_name: str) -> Transformed:
    return Transformed(body, graph, class_name)


__all__ = ["FACE", "Transformed"]
