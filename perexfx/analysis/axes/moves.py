"""Operations that only move elements: followed exactly, by running them on tags.

Promises: as in `call.py`. Where an operation picks places along the example axis, it is accepted only if the
places follow the number of examples: what fits two batch sizes by accident is refused.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perexfx.analysis.axes.call import (
    AxisRule,
    Mixing,
    OpCall,
    Result,
    Unknown,
    axes_of,
    axis_from_front,
    without_axes,
)
from perexfx.analysis.tags import layout_of, tags_of
from perexfx.ir.layout import Layout


def moved(call: OpCall) -> Result:
    """Elements are only moved: run the operation on tags."""
    args, kwargs = call.args, call.kwargs
    func = call.func
    if call.name in ("view", "view_copy", "_unsafe_view", "_reshape_alias", "_reshape_copy"):
        func, args = torch.ops.aten.reshape.default, args[:2]
    elif call.name == "constant_pad_nd":
        args, kwargs = args[:2], {}  # whatever it pads with belongs to no example
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = tuple(
        _Tagged(tuple(leaf.shape), call.layout(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    )
    return list(_moved_tags(func, described, spec, call.n))


@dataclass(frozen=True)
class _Tagged:
    """A tensor, as far as its tags depend on it."""

    shape: tuple[int, ...]
    layout: Layout | None


@lru_cache(maxsize=4096)
def _moved_tags(func: Any, leaves: tuple[Any, ...], spec: pytree.TreeSpec, n: int) -> tuple[Layout | None, ...]:
    """The layouts of the results; the blocks of a deep model ask for the same many times."""
    tags = [tags_of(leaf.layout, leaf.shape, n) if isinstance(leaf, _Tagged) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(tags, spec)
    results = func(*args, **kwargs)
    return tuple(layout_of(leaf, n) for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor))


def viewed(call: OpCall) -> Result:
    """A view of another shape, or of another dtype, where entries of the last axis may be joined or split."""
    if call.func._overloadname != "dtype":
        return moved(call)
    value = call.argument("self")
    layout = call.layout(value)
    if layout is not None and layout.axis == value.dim() - 1 and call.results[0].shape != value.shape:
        raise Mixing("it joins or splits the entries of the example axis")
    return layout


def moved_off_axis(dim: str, how: str) -> AxisRule:
    """Elements are moved along some axes, none of which may hold the examples."""

    def rule(call: OpCall) -> Result:
        value = call.tensors[0]
        layout = call.layout(value)
        if layout is not None and layout.axis in axes_of(call.argument(dim), value.dim()):
            raise Mixing(how)
        return moved(call)

    return rule


def cut(bounds: tuple[str, ...]) -> AxisRule:
    """Parts of an axis; the example axis is cut only at places that follow the number of examples."""

    def rule(call: OpCall) -> Result:
        value = call.argument("self")
        layout = call.layout(value)
        if layout is not None and layout.axis == axis_from_front(call.argument("dim", 0), value.dim()):
            for name in bounds:
                bound = call.argument(name)
                is_open = bound is None or bound == 0 or (bound == sys.maxsize and name == "end")
                if not is_open and name not in call.differing:
                    raise Mixing("it picks examples by their position")
            if call.argument("step", 1) != 1:
                raise Mixing("it picks examples by their position")
        return moved(call)

    return rule


def diagonal(call: OpCall) -> Result:
    """The entries along two axes at once."""
    value = call.argument("self")
    layout = call.layout(value)
    axes = {axis_from_front(call.argument(name), value.dim()) for name in ("dim1", "dim2")}
    if layout is None or layout.axis in axes:
        raise Mixing("it takes another entry of each example")
    return without_axes(layout, axes)


def diagonal_written(call: OpCall) -> Result:
    """The entries along two axes at once, replaced."""
    diagonal(call)
    return moved(call)


def strided(call: OpCall) -> Result:
    """`as_strided` of a contiguous value whose outermost axis holds the examples: each has a block of memory of its
    own, and the result must step from block to block on one axis and stay within blocks on all others.
    """
    value = call.argument("self")
    layout = call.layout(value)
    size, stride = call.argument("size"), call.argument("stride")
    offset = call.argument("storage_offset")
    offset = value.storage_offset() if offset is None else offset
    whole = value.is_contiguous() and value.storage_offset() == 0
    if layout is not None and whole and layout.axis == 0 and layout.before == 1 and not call.differing - {"size"}:
        per_example = value.numel() // call.n
        for axis, (length, step) in enumerate(zip(size, stride, strict=True)):
            parts = length // call.n
            if length % call.n or not parts or step * parts != per_example:
                continue
            others = zip(size[:axis] + size[axis + 1 :], stride[:axis] + stride[axis + 1 :], strict=True)
            if offset + sum((other - 1) * pace for other, pace in others) < step:
                return Layout(axis, 1, parts)
    raise Unknown("`as_strided` reads memory at places that are not shown to stay within one example")
