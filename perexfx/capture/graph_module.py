"""Graph modules that survive what people do with modules.

Promises: copies, pickles and `torch.save` keep every attribute of the module that one was made from; the model itself
is left as it was, and its Parameters, buffers and values are shared. Capturing a `CapturedModule` is reading it.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx, nn

from perexfx.capture.captured import Captured, check_call
from perexfx.ir.inputs import named_leaves


def twin_of(model: nn.Module, constants: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module tree of its own around the model's parameters, buffers and attributes, with a graph's constants."""
    twin = _shallow_twin(model, {})
    for name, value in constants.items():
        twin.register_buffer(name, value, persistent=False)
    return twin


def _shallow_twin(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in seen:
        twin = object.__new__(type(module))
        seen[id(module)] = twin
        twin.__dict__.update(module.__dict__)
        twin.__dict__["_parameters"] = dict(module._parameters)
        twin.__dict__["_buffers"] = dict(module._buffers)
        twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        twin.__dict__["_modules"] = {
            name: None if child is None else _shallow_twin(child, seen) for name, child in module._modules.items()
        }
    return seen[id(module)]


def _overload(name: str, overload: str) -> Any:
    """An overload by its name: `aten::silu`, `default`."""
    namespace, operation = name.split("::")
    return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


# torch cannot pickle overloads, and exported graphs name them
copyreg.pickle(torch._ops.OpOverload, lambda op: (_overload, (op._schema.name, op._overloadname)))

OF_GRAPH_MODULES = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module()))
"""What a GraphModule keeps of its own graph, beside what every module has."""


_OWN_FORWARDS = ("forward", "_compiled_call_impl")
"""What an instance may have that hides the forward of its class: it is in the graph, and would run past it."""


class WholeGraphModule(fx.GraphModule):
    """A GraphModule with every attribute of the module it was made from.

    fx itself keeps only what the graph names, and loses the rest when it copies or saves.
    """

    is_transformed: ClassVar[bool] = False
    """Whether it has a clip node."""

    def __init__(self, body: Mapping[str, Any], graph: fx.Graph, class_name: str) -> None:
        super().__init__({}, fx.Graph(), class_name)
        for name, value in body.items():
            if name not in OF_GRAPH_MODULES and name not in _OWN_FORWARDS:
                self.__dict__[name] = value
        self.graph = graph

    def _body(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in OF_GRAPH_MODULES}

    def __reduce__(self) -> Any:
        graph = copy.deepcopy(self.graph)  # without its link back to this module
        return _rebuild, (_own_class(self), self._body(), graph, type(self).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        body = copy.deepcopy(self._body(), memo)
        copied = _rebuild(_own_class(self), body, copy.deepcopy(self.graph), type(self).__name__)
        memo[id(self)] = copied
        return copied


def _own_class(module: WholeGraphModule) -> type[Any]:
    """The class that has a name: fx gives each GraphModule one of its own below it."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.startswith("perexfx."))


def _rebuild(cls: type[Any], body: Mapping[str, Any], graph: fx.Graph, class_name: str) -> Any:
    return cls(body, graph, class_name)


M = TypeVar("M", bound="CapturedModule")


class CapturedModule(WholeGraphModule):
    """A module whose forward is a graph in functional form, as `capture` makes them: what rewrites take and return.

    A call that the graph does not hold for (another mode, other arguments that are no tensors) is an error.
    """

    _captured: Captured

    @classmethod
    def around(cls: type[M], twin: nn.Module, captured: Captured, **attributes: Any) -> M:
        """A module with the attributes of another, and a graph in the place of its forward.

        Args:
            twin: From `twin_of`, with the graph's constants.
            captured: The graph, and what it holds for.
            attributes: Further attributes of the module.
        """
        holds_for = replace(captured, graph=fx.Graph(), constants={})
        body = {**twin.__dict__, **attributes, "_captured": holds_for}
        return cls(body, captured.graph, type(twin).__name__)

    @property
    def captured(self) -> Captured:
        """The graph, a copy, and what it holds for."""
        return replace(self._captured, graph=copy.deepcopy(self.graph))

    def recompile(self) -> Any:
        """The forward checks what it is called with."""
        code = super().recompile()
        cls: Any = type(self)
        forward, signature = cls.forward, inspect.signature(cls.forward)

        @wraps(forward)
        def checked(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
            given = named_leaves(
                {k: v for k, v in signature.bind(self, *args, **kwargs).arguments.items() if k != "self"}
            )
            if not any(isinstance(value, fx.Proxy) for value in given.values()):  # the graph around is checked
                check_call(self._captured, self, given)
            return forward(self, *args, **kwargs)

        cls.forward = checked
        return code


__all__ = ["OF_GRAPH_MODULES", "CapturedModule", "WholeGraphModule", "twin_of"]
