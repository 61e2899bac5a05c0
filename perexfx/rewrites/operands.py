"""What nodes add, average, scale and write over, whichever way it was written.

Promises: a node is read as an addition, a stack's sum or a scaling only where it is nothing else.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from perexfx.capture import IN_PLACE_FUNCTIONS

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_ADDING_METHODS = ("add", "add_")


def addends(node: fx.Node) -> list[tuple[Any, float]] | None:
    """What an addition adds, each with its factor; None for other nodes."""
    is_function = node.op == "call_function" and node.target in _ADDITIONS
    if not is_function and not (node.op == "call_method" and node.target in _ADDING_METHODS):
        return None
    given = {**dict(zip(("input", "other"), node.args, strict=False)), **node.kwargs}
    alpha = given.get("alpha", 1)
    if "input" not in given or "other" not in given or "out" in given or not isinstance(alpha, int | float):
        return None
    return [(given["input"], 1.0), (given["other"], float(alpha))]


def writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node may write in place, by its name or its arguments."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    in_place = node.target in IN_PLACE_FUNCTIONS or name.endswith("_")
    return node.op == "call_function" and (in_place or any(arg is True for arg in (*node.args, *node.kwargs.values())))


_REDUCTIONS = {torch.sum: "sum", torch.mean: "mean", "sum": "sum", "mean": "mean"}


def stacked(node: fx.Node, rank: Any) -> tuple[list[fx.Node], str] | None:
    """What a sum or mean over the axis of a stack merges, and which of them it is; None for other nodes."""
    kind = _REDUCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if kind is None:
        return None
    given = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    stack, dim = given.get("input"), given.get("dim", given.get("axis"))
    if isinstance(dim, list | tuple) and len(dim) == 1:
        dim = dim[0]
    if not (isinstance(stack, fx.Node) and stack.op == "call_function" and stack.target is torch.stack):
        return None
    inside = {**dict(zip(("tensors", "dim"), stack.args, strict=False)), **stack.kwargs}
    tensors, own = inside.get("tensors"), inside.get("dim", 0)
    if given.get("keepdim") or given.get("dtype") or not isinstance(dim, int) or not isinstance(own, int):
        return None
    if not isinstance(tensors, list | tuple) or not all(isinstance(each, fx.Node) for each in tensors):
        return None
    axes = rank(tensors[0]) + 1 if tensors else 1
    return (list(tensors), kind) if dim % axes == own % axes else None  # pyright: ignore[reportReturnType]


_SCALINGS = (operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div, "mul", "div")


def scaled(node: fx.Node, carrying: set[fx.Node]) -> fx.Node | None:
    """What a node multiplies or divides by something without examples; None for other nodes."""
    if node.target not in _SCALINGS or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    divides = node.target in (operator.truediv, operator.itruediv, torch.div, "div")
    if isinstance(first, fx.Node) and first in carrying and second not in carrying:
        return first
    if not divides and isinstance(second, fx.Node) and second in carrying and first not in carrying:
        return second
    return None


_PROBABILITIES = (torch.softmax, torch.sigmoid, F.softmax, F.sigmoid, "softmax", "sigmoid")


def is_of_probabilities(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node makes probabilities of logits."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.Softmax | nn.Sigmoid)
    return node.target in _PROBABILITIES


def is_dict(target: Any) -> bool:
    """Whether a node's target is a kind of dict."""
    return isinstance(target, type) and issubclass(target, dict)


_WITHOUT_VALUES = frozenset("size dim numel new_zeros new_ones new_full new_empty".split())
_LIKE = (torch.zeros_like, torch.ones_like, torch.full_like)


def carriers(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values follow from those of the inputs, and not from their sizes alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads_shape = (node.op == "call_method" and node.target in _WITHOUT_VALUES) or (
            node.op == "call_function"
            and (node.target in _LIKE or (node.target is getattr and node.args[1] in ("shape", "dtype", "device")))
        )
        if node.op == "placeholder" or (not reads_shape and found.intersection(node.all_input_nodes)):
            found.add(node)
    return found


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that a node is computed from, without itself."""
    found, stack = set(), list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack += current.all_input_nodes
    return found


__all__ = ["addends", "ancestors", "carriers", "is_dict", "is_of_probabilities", "scaled", "stacked", "writes"]
