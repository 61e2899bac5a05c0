"""Tracing: torch.fx's tracer, with the places it does not note and the effects it does not record.

Promises: every node knows its module and source line; in-place arithmetic is recorded as such; autocast, random
constants and writes that autograd would not see are errors.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from perexfx.capture.custom_functions import CustomFunction
from perexfx.capture.leaf import LeafModule
from perexfx.capture.places import user_line
from perexfx.capture.traceable import forward_of, traceable
from perexfx.ir.errors import CaptureError
from perexfx.ir.node import NodeInfo, annotate

TRACING = threading.RLock()
"""fx patches torch.nn.Module while it traces: one thread at a time may trace, or run a graph for its shapes."""


def same_einsums() -> AbstractContextManager[None]:
    """Without opt_einsum, where it is installed: the order in which it multiplies depends on the batch size."""
    return torch.backends.opt_einsum.flags(enabled=False)


class _Proxy(fx.Proxy):
    """Records augmented assignments as what they are: in place."""


def _record_in_place(name: str) -> Any:
    function = getattr(operator, name)

    def method(self: _Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(_Proxy, f"__{_name}__", _record_in_place(_name))


class _AttributeProxy(_Proxy):
    """A parameter or buffer: its shape is the same in every call, and the forward may branch on it."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, shape: torch.Size) -> None:
        super().__init__(node, tracer)
        self.known_shape = shape

    @property
    def shape(self) -> torch.Size:
        return self.known_shape

    @property
    def ndim(self) -> int:
        return len(self.known_shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.known_shape if dim is None else self.known_shape[dim]

    def dim(self) -> int:
        return len(self.known_shape)

    def numel(self) -> int:
        return self.known_shape.numel()

    def __len__(self) -> int:
        return self.known_shape[0]


_OF_SEVERAL_INPUTS = ("torch.nn.modules.distance", "torch.nn.modules.loss")
"""Where parameter-free modules may be given parameters together with examples, which layer rules then cover."""


class Tracer(fx.Tracer):
    """Traces through every module that has parameters or buffers, and notes where each node comes from."""

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shapes = {name: value.shape for name, value in (*model.named_parameters(), *model.named_buffers())}
        self.inside: list[tuple[str, str]] = []  # path and type of the modules being traced; kept where one fails
        self.autocast_outside = torch.is_autocast_enabled("cpu")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Parameter-free torch modules of one input stay modules, and our own that are made to."""
        if isinstance(m, LeafModule):
            return True
        if not super().is_leaf_module(m, module_qualified_name) or type(m).__module__ in _OF_SEVERAL_INPUTS:
            return False
        return next(m.parameters(), None) is None and next(m.buffers(), None) is None

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy that records in-place arithmetic faithfully, and knows the shapes of parameters and buffers."""
        if node.op == "get_attr" and node.target in self.shapes:
            return _AttributeProxy(node, self, self.shapes[str(node.target)])
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Torch's own modules that look at values or ranks are traced by forwards that do not."""
        self.inside.append((self.path_of_module(m), type(m).__name__))
        with traceable(m):
            result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result

    def create_arg(self, a: Any) -> Any:
        """Ordered dicts stay what they are; torch.fx would make plain ones of them."""
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """The model may be such a module itself."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        forward = forward_of(self.root)
        return (function if forward is None else lambda _, *given: forward(*given)), args

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds the place, and what fx does not record: `torch.no_grad()` and autocast."""
        node = super().create_node(*args, **kwargs)
        source = user_line()
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        module = list(stack.values())[-1][0]
        if torch.is_autocast_enabled("cpu") != self.autocast_outside:
            raise CaptureError(
                f"The forward switches autocast at {source}, which a traced graph does not record. "
                "Convert the model to the dtype you want instead."
            )
        if not torch.is_grad_enabled() and writes_into_activation(node, self.root):
            raise CaptureError(
                f"The forward writes in place under torch.no_grad() at {source}: autograd does not see the write, and "
                "a traced graph would record it. Compute a new value and `detach()` it instead."
            )
        return annotate(node, NodeInfo(module, source, stops_gradient=not torch.is_grad_enabled()))


def record_custom(function: type[Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A custom function as one node, where it is given what is traced."""
    given = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)), None)
    if given is None:
        return NotImplemented
    return given.tracer.create_proxy("call_function", CustomFunction(function), args, kwargs)


def states_outside_torch() -> tuple[Any, ...]:
    """Of the generators that torch does not know."""
    numpy = sys.modules.get("numpy")
    drawn = () if numpy is None else tuple(map(repr, numpy.random.get_state()))
    return random.getstate(), *drawn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts back attributes, lists among them, and buffers of all modules: a forward may assign stand-ins to them."""
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    lists = [(value, list(value)) for _, found, _ in before for value in found.values() if type(value) is list]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for value, content in lists:
            value[:] = content


def writes_into_activation(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node changes a value that was computed (parameters and buffers may be changed)."""
    written = node.args[0] if node.args else None
    if not isinstance(written, fx.Node) or written.op == "get_attr":
        return False
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (
        name in ("iadd", "isub", "imul", "itruediv") or name.endswith("_") or bool(node.kwargs.get("inplace"))
    )


_FACTORIES = ("zeros", "ones", "empty", "rand", "randn")


@contextmanager
def loose_sizes() -> Iterator[None]:
    """`torch.zeros(x.shape[0], 3)` records like `torch.zeros((x.shape[0], 3))`, which is all that torch.fx takes."""
    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, original in originals.items():
            setattr(torch, name, _taking_loose_sizes(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _taking_loose_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    def factory(*args: Any, **kwargs: Any) -> Any:
        proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
        if proxy is None or len(args) == 1:
            return original(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", original, (args,), kwargs)

    return factory


_RANDOM_MAKERS = frozenset("rand randn randint randperm normal bernoulli multinomial poisson".split())


class NoRandomConstants(TorchFunctionMode):
    """Notices random numbers drawn while tracing: they would be frozen into the graph.

    torch's are seen at the call that draws them; those of Python's `random` and of NumPy when tracing is over.
    """

    def __enter__(self) -> Any:
        self.outside = states_outside_torch()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None and states_outside_torch() != self.outside:
            raise CaptureError(
                "The forward draws random numbers from Python's `random` or from NumPy: a traced graph would use the "
                "same ones for ever. Draw them with `torch.rand_like(x)` or the like."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        made = isinstance(result, torch.Tensor) and getattr(func, "__name__", "") in _RANDOM_MAKERS
        if made or not torch.equal(before, torch.get_rng_state()):
            raise CaptureError(
                f"The forward draws random numbers at {user_line()} whose shape does not follow an input: a traced "
                "graph would use the same numbers for ever. Draw them with `torch.randn_like(x)` or the like, or with "
                "a shape that is read off an input (`torch.randn(x.shape[0], ...)`)."
            )
        return result
