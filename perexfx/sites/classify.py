"""Classification: what does each node's value depend on?

Promises: with an analysis the answer is what the shapes say. Without one, `x.shape[batch_dim]` is taken to be the batch
size and every other size to be constant, which `perexfx.sites.match.confirm` checks as soon as shapes are known.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from enum import Enum, auto

import torch
from torch import fx

from perexfx.analysis import Analysis
from perexfx.capture import stop_gradient


class State(Enum):
    """What a node's value depends on."""

    CONSTANT = auto()
    PARAMETER = auto()  # trainable parameters and constants
    EXAMPLE = auto()


_ATTRIBUTES_OF_SHAPE = ("shape", "device", "dtype", "ndim", "requires_grad", "is_cuda", "layout", "itemsize")


_METHODS_OF_SHAPE = ("size", "dim", "numel", "ndimension", "is_floating_point", "get_device", "element_size")


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node takes sizes, dtype or device of a value, and none of its numbers."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in _ATTRIBUTES_OF_SHAPE
    return node.op == "call_method" and node.target in _METHODS_OF_SHAPE


def classify(
    graph: fx.Graph, trainable: Collection[str], batch_dim: int, analysis: Analysis | None
) -> dict[fx.Node, State]:
    """What each node's value depends on.

    Args:
        graph: In functional form.
        trainable: Names of the parameters that are trained.
        batch_dim: The example axis of the inputs.
        analysis: What is known about the values, where shapes are.
    """
    states: dict[fx.Node, State] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            states[node] = State.PARAMETER if node.target in trainable else State.CONSTANT
            continue
        if analysis is not None:
            carries = analysis.carries_examples(node)
        else:
            carries = _carries_examples(node, states, batch_dim)
        if carries:
            states[node] = State.EXAMPLE
        elif (
            passes_no_gradient(node)
            or not any(states[n] is State.PARAMETER for n in node.all_input_nodes)
            or (analysis is not None and not analysis.has_gradient(node))
        ):
            states[node] = State.CONSTANT
        else:
            states[node] = State.PARAMETER
    return states


def passes_no_gradient(node: fx.Node) -> bool:
    """Whether no gradient passes through a node, whatever it reads."""
    detaches = node.target in ("detach", stop_gradient, torch.detach) or (
        node.target is getattr and node.args[1] == "data"
    )
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    makes_new = name.endswith("_like") or name.startswith("new_")
    return reads_shape_only(node) or detaches or makes_new or node.op == "placeholder"


def _carries_examples(node: fx.Node, states: Mapping[fx.Node, State], batch_dim: int) -> bool:
    """Without an analysis: whatever examples flow into, except sizes of other axes than `batch_dim`."""
    if node.op == "placeholder":
        return not node.args or node.args[0] is not None
    if reads_shape_only(node):
        value = node.args[0]
        whole_shape = node.target is getattr or (node.target == "size" and len(node.args) == 1)
        axis = None if whole_shape else (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
        reads_batch = node.target == "numel" or axis == batch_dim or (whole_shape and _is_shape(node))
        return isinstance(value, fx.Node) and states[value] is State.EXAMPLE and bool(reads_batch)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and _is_shape(node.args[0]):
        index = node.args[1]
        if isinstance(index, int):
            takes_batch = index == batch_dim
        else:
            takes_batch = not isinstance(index, slice) or batch_dim in range(8)[index]
        return states[node.args[0]] is State.EXAMPLE and takes_batch
    return any(states[n] is State.EXAMPLE for n in node.all_input_nodes)


def _is_shape(node: fx.Node) -> bool:
    """Whether a node is `x.shape` or `x.size()`."""
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
