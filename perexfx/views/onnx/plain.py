"""A transformed module's forward without its machinery, in which every graph node runs in a module of its own.

Promises: it computes what the transformed module does, on a flat list of tensors, and returns tensors by name. An
export of it says of each of its operations which node it belongs to: `node_name` reads that from a module path.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.ir.inputs import named_leaves
from perexfx.ir.node import info_of
from perexfx.ir.recurrent import lstm_layer
from perexfx.runtime import Transformed, clip, cut, runtime_of
from perexfx.views.onnx.recurrent import lstm_in_torch_or_steps
from perexfx.views.onnx.translate import free_name

_OWNER, _NODES = "gm", "nodes"
_NODE = "node_"
"""Begins the name of a node's module: by its own, it could be one that modules need themselves, as `to`."""


class Plain(nn.Module):
    """The forward, of the tensors among some arguments, in order.

    Args:
        gm: A transformed module.
        arguments: Of its forward, by name; what is not a tensor in them is fixed.
    """

    def __init__(self, gm: Transformed, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = dict(arguments)
        self.names = tuple(name for name, leaf in named_leaves(arguments).items() if isinstance(leaf, Tensor))
        self.add_module(_OWNER, gm)
        nodes = nn.Module()
        for node in gm.graph.nodes:
            if node.op.startswith("call_"):
                nodes.add_module(f"{_NODE}{node.name}", _Call(gm, node))
        self.add_module(_NODES, nodes)
        self.training = gm.training

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The output's tensors by name."""
        gm: Any = getattr(self, _OWNER)
        runs = _Runs(gm, getattr(self, _NODES))
        result = runs.run(*self._given(gm.graph, dict(zip(self.names, tensors, strict=True))))
        return named_outputs(result, (*tensors, *gm.parameters(), *gm.buffers()))

    def _given(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
        """The graph's arguments, those of `*args` one by one."""
        for node in graph.nodes:
            if node.op != "placeholder":
                continue
            name = str(node.target)
            if name.startswith("**"):
                continue
            default = node.args[0] if node.args else None
            value = self.arguments.get(name.lstrip("*"), default)
            value = _with_tensors(name.lstrip("*"), value, tensors)
            yield from (value or ()) if name.startswith("*") else (value,)


def node_name(path: str) -> str | None:
    """Name of the graph node that a module of `Plain` stands for; None for other modules."""
    start = f"{_NODES}.{_NODE}"
    return path.removeprefix(start) if path.startswith(start) else None


def own_name(name: str) -> str:
    """A parameter's or buffer's name in the transformed module, from its name in `Plain`."""
    return name.removeprefix(f"{_OWNER}.")


def readable(name: str) -> str:
    """A leaf's name without brackets: `batch.image` for `batch['image']`, `x.0` for `x[0]`."""
    return re.sub(r"\[['\"]?(.*?)['\"]?\]", r".\1", name)


def _with_tensors(name: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """An argument with other tensors in the place of its own."""
    if isinstance(value, Tensor):
        return tensors[name]
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
        return value
    return pytree.tree_map_with_path(lambda path, leaf: tensors.get(f"{name}{pytree.keystr(path)}", leaf), value)


def named_outputs(result: Any, others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """A forward's tensors by the names that they have in a file; those among `others`, and second ones, are copies."""
    taken, names, found = {id(value) for value in others}, set[str](), dict[str, Tensor]()
    for path, value in _outputs(result):
        name = free_name(path, names)  # two paths may read alike: {"a": {"b": x}, "a.b": y}
        found[name] = value.clone() if id(value) in taken else value
        taken.add(id(value))
    return found


def _outputs(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a result, by the path to them: `output`, `output.0`, `logits`."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _outputs(part, f"{name}.{key}".removeprefix("."))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _outputs(getattr(value, field.name), f"{name}.{field.name}".removeprefix("."))
    elif isinstance(value, tuple | list):
        for at, part in enumerate(value):
            yield from _outputs(part, f"{name or 'output'}.{at}")


class _Call(nn.Module):
    """One node's call, without what perexfx put around it."""

    def __init__(self, gm: Transformed, node: fx.Node) -> None:
        super().__init__()
        self.op, self.role = node.op, info_of(node).role
        self.target: Any = node.target
        if self.role == "site":
            name: Any = node.args[2]
            self.target = runtime_of(gm).sites.site(name).target
            self.op = "call_method" if isinstance(self.target, str) else "call_function"
        self.training = gm.training

    def forward(self, runs: fx.Interpreter, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The node's value."""
        if self.role == "site":
            args = args[4:]
        elif self.role in ("norm", "format"):  # both return their second argument
            return args[1]
        elif self.target is cut:
            return args[1], args[3]
        elif self.role == "tape":
            return None
        elif self.target is clip:
            return (None, *args[2:])
        call: Callable[..., Any] = getattr(runs, self.op)
        target = lstm_in_torch_or_steps if self.target is lstm_layer else self.target
        return call(target, tuple(args), dict(kwargs))


class _Runs(fx.Interpreter):
    """Runs the graph, each node in its own module."""

    def __init__(self, gm: Transformed, nodes: nn.Module) -> None:
        super().__init__(gm, graph=gm.graph)
        self.nodes = nodes

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not n.op.startswith("call_") or n.target is operator.getitem:
            return getattr(self, n.op)(n.target, args, kwargs)
        return self.nodes.get_submodule(f"{_NODE}{n.name}")(self, args, kwargs)

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An argument; keyword arguments without a name of their own are none, which every call is checked for."""
        return {} if target.startswith("**") else super().placeholder(target, args, kwargs)


def example_sizes(plain: Plain, batch_dim: int, carriers: Sequence[bool], n: int) -> list[Tensor]:
    """The tensors to export with: those given, or of `n` examples where they have other sizes."""
    found = []
    given = named_leaves(plain.arguments)
    for name, carries in zip(plain.names, carriers, strict=True):
        value = given[name]
        if carries and value.shape[batch_dim] != n:
            value = torch.zeros(
                (*value.shape[:batch_dim], n, *value.shape[batch_dim + 1 :]), dtype=value.dtype, device=value.device
            )
        found.append(value)
    return found


__all__ = ["Plain", "example_sizes", "named_outputs", "node_name", "own_name", "readable"]
