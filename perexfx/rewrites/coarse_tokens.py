"""Tokens of coarse images: a map of patches that is flattened into tokens, and all that is computed of them.

Promises: what reads tokens is left as it is, on a fourth of them; tables of positions are pooled; where that is not
known to be about the same (tokens taken by their place, sizes written into the model), the model is reduced with its
tokens grown to their fine number instead.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from perexfx.analysis import leaves_of, record
from perexfx.ir.errors import RefusedError
from perexfx.kernels.coarse import half, pooled_tokens
from perexfx.rewrites.coarse import Coarsening, by, label
from perexfx.rewrites.subject import Subject

MOST_BEFORE = 8
"""Tokens of no place, such as that of the class, that may come before those of patches."""


class NoTokensError(Exception):
    """The model does something with its tokens that fewer of them do not stand for."""


def flatten(c: Coarsening, node: fx.Node) -> bool:
    """A map becomes tokens, where these may be fewer; else it is grown first, as any flattening head is."""
    x = node.args[0] if node.args else None
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
    count, given = c.count, dict(c.new)
    for value in node.all_input_nodes:
        shape = c.shapes.get(value.name, ())
        if value in c.of_tokens or len(shape) < 2 or not 0 <= shape[-2] - count <= MOST_BEFORE:
            continue
        if not c.is_of_parameters(value) or value.name not in c.subject.floating:
            raise NoTokensError
        given[value] = c.call(value, pooled_tokens, c.new[value], c.grid, shape[-2] - count)
        c.note(value, f"table of {by(c.grid)} tokens", f"mean of blocks: {by(half(c.grid))}")
    c.new[node] = c.graph.node_copy(node, given.__getitem__)
    c.of_tokens.add(node)


def _takes_by_place(node: fx.Node, c: Coarsening) -> bool:
    """Whether a node takes some tokens and not others (but those of no place, or all behind them), counts them, adds
    them up, or makes features of them.
    """
    name = _name(node, c)
    if name == "einsum":
        return True
    x = node.args[0] if node.args else next(iter(node.all_input_nodes), None)
    shape = c.shapes.get(x.name, ()) if isinstance(x, fx.Node) else ()
    before = {axis: size - c.count for axis, size in enumerate(shape) if 0 <= size - c.count <= MOST_BEFORE}
    if not before:
        return False
    if node.target is operator.getitem:
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if Ellipsis in parts or None in parts:
            return True
        return any(_is_by_place(part, before[axis]) for axis, part in enumerate(parts) if axis in before)
    if name in _PRODUCTS:
        return _sums_tokens(node, shape, before, c)
    if name in _RESHAPES:  # features of tokens, where no axis of them is left
        made = c.shapes.get(node.name, ())
        return not any(size % max(1, shape[axis]) == 0 for size in made[:-1] for axis in before) and len(made) < 4
    if name not in _TAKING:
        return False
    dims = [arg for arg in (*node.args[1:], *node.kwargs.values()) if isinstance(arg, int)]
    return name in _ANYWHERE or not dims or any(dim % len(shape) in before for dim in dims)


def _name(node: fx.Node, c: Coarsening) -> str:
    return label(node, c.subject).lower()


def _is_by_place(part: Any, before: int) -> bool:
    if not isinstance(part, slice):
        return not (isinstance(part, int) and 0 <= part < before)
    ends = (part.start, part.stop)
    return part.step not in (None, 1) or any(
        not (end is None or (isinstance(end, int) and 0 <= end <= before)) for end in ends
    )


def _sums_tokens(node: fx.Node, shape: tuple[int, ...], before: Mapping[int, int], c: Coarsening) -> bool:
    """Whether a product adds up tokens with weights that are no softmax's: it then grows with their number."""
    left = node.args[0] if node.args else None
    if not isinstance(left, fx.Node):
        return True
    if len(shape) - 1 not in before:
        return False
    while isinstance(left, fx.Node) and _name(left, c) not in ("softmax",):
        if _name(left, c) not in ("dropout", "to", "type_as", "getitem", "contiguous"):
            return True
        left = left.args[0] if left.args else None
    return False


_PRODUCTS = frozenset("matmul bmm baddbmm einsum tensordot mm".split())
_RESHAPES = frozenset("flatten view reshape".split())
_ANYWHERE = frozenset(
    "roll flip gather index_select take_along_dim masked_select unfold conv1d avg_pool1d max_pool1d avgpool1d "
    "maxpool1d interpolate conv_transpose1d adaptive_avg_pool1d lstm gru".split()
)
_TAKING = _ANYWHERE | frozenset(
    "chunk split unbind narrow select tensor_split split_with_sizes topk sort argsort argmax argmin sum cumsum cumprod "
    "prod norm normalize vector_norm logsumexp count_nonzero".split()
)
"""Operations that take parts of an axis, or depend on how long it is; the first along any axis."""


def fits(c: Coarsening, graph: fx.Graph, subject: Subject) -> bool:
    """Whether a graph runs on fewer tokens, and returns what the model does: by a run for shapes alone."""
    assert subject.sizes is not None
    try:
        run = record(graph, subject.twin, subject.sizes[0], 0, subject.sizes[1])
    except RefusedError:
        return False
    return [tuple(leaf.shape) for leaf in leaves_of(run.values["output"])] == list(subject.outputs)


__all__ = ["NoTokensError", "add_of_tokens", "fits", "flatten"]
