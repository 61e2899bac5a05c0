"""Tokens of coarse images: a map of patches that is flattened into tokens, and all that is computed of them.

Promises: what reads tokens is left as it is, on a fourth of them; tables of positions are pooled; where that is not
known to be about the same (tokens taken by their place, sizes written into the model), the model is reduced with its
tokens grown to their fine number instead.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from perexfx.analysis import leaves_of, record
from perexfx.ir.errors import RefusedError
from perexfx.kernels.coarse import half, pooled_tokens
from perexfx.rewrites.coarse import Coarsening, by
from perexfx.rewrites.subject import Subject

MOST_BEFORE = 8
"""Tokens of no place, such as that of the class, that may come before those of patches."""


class NoTokensError(Exception):
    """The model does something with its tokens that fewer of them do not stand for."""


def flatten(c: Coarsening, node: fx.Node) -> bool:
    """A map becomes tokens, where these may be fewer; else it is grown first, as any flattening head is."""
    x = node.args[0]
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 1 if node.op == "call_module" else 0)
    if node.op == "call_module" or not c.keeps_tokens or start != 2 or x not in c.coarse or len(node.args) > 2:
        return False
    assert isinstance(x, fx.Node)
    if c.grid not in (None, c.size(x)):
        raise NoTokensError
    c.grid = c.size(x)
    c.new[node] = c.copied(node)
    c.of_tokens.add(node)
    c.note(node, f"tokens of {by(c.grid)}", f"tokens of {by(half(c.grid))}")
    return True


def add_of_tokens(c: Coarsening, node: fx.Node) -> None:
    """A node that reads tokens: the same, with tables of positions pooled.

    Raises:
        NoTokensError: It takes tokens by their place.
    """
    assert c.grid is not None
    if _takes_by_place(node, c):
        raise NoTokensError
    count, given = c.grid[0] * c.grid[1], dict(c.new)
    for value in node.all_input_nodes:
        shape = c.shapes.get(value.name, ())
        if value in c.of_tokens or len(shape) < 2 or not 0 <= shape[-2] - count <= MOST_BEFORE:
            continue
        if not c.is_of_parameters(value):
            raise NoTokensError
        given[value] = c.call(value, pooled_tokens, c.new[value], c.grid, shape[-2] - count)
        c.note(value, f"table of {by(c.grid)} tokens", f"mean of blocks: {by(half(c.grid))}")
    c.new[node] = c.graph.node_copy(node, given.__getitem__)
    c.of_tokens.add(node)


def _takes_by_place(node: fx.Node, c: Coarsening) -> bool:
    """Whether a node takes some tokens and not others: but the first few, or all behind them."""
    x = node.args[0] if node.args else None
    shape = c.shapes.get(x.name, ()) if isinstance(x, fx.Node) else ()
    assert c.grid is not None
    count = c.grid[0] * c.grid[1]
    axes = {axis for axis, size in enumerate(shape) if 0 <= size - count <= MOST_BEFORE}
    if not axes:
        return False
    if node.target is operator.getitem:
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts or None in parts:
            return True
        return any(axis in axes and _is_by_place(part) for axis, part in enumerate(parts))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name not in _TAKING:
        return False
    dims = [arg for arg in (*node.args[1:], *node.kwargs.values()) if isinstance(arg, int)]
    return name in _ANYWHERE or any(dim % len(shape) in axes for dim in dims)


def _is_by_place(part: Any) -> bool:
    places = (part.start, part.stop, part.step) if isinstance(part, slice) else (part,)
    return any(not (place is None or (isinstance(place, int) and 0 <= place <= MOST_BEFORE)) for place in places)


_ANYWHERE = frozenset("roll flip gather index_select take_along_dim masked_select unfold".split())
_TAKING = _ANYWHERE | frozenset("chunk split unbind narrow select tensor_split split_with_sizes topk sort".split())
"""Operations that take parts; the first along any axis."""


def fits(c: Coarsening, graph: fx.Graph, subject: Subject) -> bool:
    """Whether a graph runs on fewer tokens, and returns what the model does: by a run for shapes alone."""
    assert subject.sizes is not None
    try:
        run = record(graph, subject.twin, subject.sizes[0], 0, subject.sizes[1])
    except RefusedError:
        return False
    return [tuple(leaf.shape) for leaf in leaves_of(run.values["output"])] == list(subject.outputs)


__all__ = ["NoTokensError", "add_of_tokens", "fits", "flatten"]
