"""In-place arithmetic to out-of-place, where nothing else can see the difference.

Promises: a node is replaced only if the memory it writes was made by an operation that returns fresh memory, and is
seen by no other node through a view; every later read of the overwritten value reads the new one. Where that cannot
be shown the node stays in place, as it was written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from perexfx.ir.node import annotate, info_of

IN_PLACE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_METHODS = {
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "div_": torch.div,
    "subtract_": torch.sub,
    "multiply_": torch.mul,
    "divide_": torch.div,
}

_FRESH_FUNCTIONS = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    operator.neg,
    operator.pow,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.cat,
    torch.stack,
    torch.matmul,
    torch.bmm,
    torch.tanh,
    torch.sigmoid,
    torch.exp,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    F.linear,
    F.layer_norm,
    F.group_norm,
    F.rms_norm,
    F.instance_norm,
    F.batch_norm,
    F.embedding,
    F.gelu,
    F.softmax,
    F.scaled_dot_product_attention,
    F.pad,
}
_FRESH_METHODS = frozenset("add sub mul div matmul bmm tanh sigmoid exp mean sum clone softmax repeat".split())
_VIEW_METHODS = frozenset(
    "view reshape flatten unflatten transpose permute unsqueeze squeeze t movedim swapaxes contiguous".split()
)


def out_of_place(graph: fx.Graph, module: nn.Module) -> None:
    """Replaces in-place arithmetic in a graph, where that is safe.

    Args:
        graph: Is changed.
        module: Holds the modules that the graph names.
    """
    order = {node: at for at, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        function = IN_PLACE_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        if node.op == "call_method":
            function = _METHODS.get(str(node.target))
        written = node.args[0] if node.args else None
        if function is None or not isinstance(written, fx.Node) or not _is_private(written, node, order, module):
            continue
        for user in [user for user in written.users if order[user] > order[node]]:
            user.replace_input_with(written, node)
        node.op, node.target = "call_function", function
        annotate(node, replace(info_of(node), overwrites=True))


def _is_private(written: fx.Node, writer: fx.Node, order: dict[fx.Node, int], module: nn.Module) -> bool:
    """Whether the memory of a value is seen by nobody but itself, and what reads it without making views."""
    before = [user for user in written.users if user is not writer and order[user] < order[writer]]
    if not all(_is_fresh(user, module) for user in before):
        return False
    while not _is_fresh(written, module):
        base = written.args[0] if written.args else None
        is_view = written.op == "call_method" and written.target in _VIEW_METHODS
        if not is_view or not isinstance(base, fx.Node) or len(base.users) != 1:
            return False
        written = base
    return True


def _is_fresh(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node returns memory that nothing else has."""
    if node.op == "call_function":
        return node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs
    if node.op == "call_method":
        return node.target in _FRESH_METHODS
    if node.op == "call_module":
        owner = module.get_submodule(str(node.target))
        kind = type(owner).__module__
        return kind in ("torch.nn.modules.activation", "torch.nn.modules.pooling") and not getattr(
            owner, "inplace", False
        )
    return False
