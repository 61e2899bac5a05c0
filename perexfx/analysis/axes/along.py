"""Operations that work along some axes and leave the others alone: reductions, sorts, pooling, normalisation.

Promises: as in `call.py`. None of the axes worked along holds the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from perexfx.analysis.axes.call import (
    OPAQUE,
    AxisRule,
    Followed,
    Mixing,
    OpCall,
    Result,
    Unknown,
    agree,
    at_axis,
    axes_of,
    axis_from_front,
    without_axes,
)
from perexfx.ir.layout import Layout


def reduce(call: OpCall) -> Result:
    """Sums and the like over `dim`."""
    value = call.argument("self")
    layout = call.layout(value)
    if layout is None:
        raise Unknown(f"`{call.name}` reads examples in an argument that is not its first")
    axes = axes_of(call.argument("dim"), value.dim())
    if layout.axis in axes:
        raise Mixing("it reduces over the example axis")
    return layout if call.argument("keepdim", False) else without_axes(layout, axes)


def along(dim: str = "dim") -> AxisRule:
    """Softmax, cumulative sums, sorting, transforms: along some axes, all others untouched."""

    def rule(call: OpCall) -> Result:
        value = call.tensors[0]
        layout = call.layout(value)
        if layout is not None and layout.axis in axes_of(call.argument(dim, -1), value.dim()):
            raise Mixing("it runs along the example axis")
        return layout

    return rule


def across(call: OpCall) -> Result:
    """Several values of one rank, along `dim`: cross products."""
    layout = agree([call.layout(tensor) for tensor in call.tensors])
    rank = call.results[0].dim()
    if layout is not None and layout.axis == axis_from_front(call.argument("dim", -1), rank):
        raise Mixing("it runs along the example axis")
    return layout


def on_last(axes: int) -> AxisRule:
    """Works within the last axes: pooling, padding, resampling, triangles."""

    def rule(call: OpCall) -> Result:
        value = call.tensors[0]
        layout = agree([call.layout(tensor) for tensor in call.tensors])
        if layout is not None and layout.axis >= value.dim() - axes:
            raise Mixing("it works within the example axis")
        return layout

    return rule


def slices_along(call: OpCall) -> Result:
    """`renorm`: every slice along `dim` is scaled by its own norm, over all other axes."""
    value = call.argument("self")
    layout = call.layout(value)
    if layout is not None and layout.axis != axis_from_front(call.argument("dim"), value.dim()):
        raise Mixing("it takes norms over the example axis")
    return layout


def columns(call: OpCall) -> Result:
    """`im2col`: `[N, C, H, W]` to `[N, C * window, positions]`."""
    value = call.argument("self")
    layout = call.layout(value)
    if layout is None or layout.axis >= value.dim() - 2:
        raise Mixing("it works within the example axis")
    if layout.axis == value.dim() - 3:
        return Layout(layout.axis, layout.before, layout.after * math.prod(call.argument("kernel_size")))
    return layout


def from_columns(call: OpCall) -> Result:
    """`col2im`: `[N, C * window, positions]` to `[N, C, H, W]`."""
    value = call.argument("self")
    layout = call.layout(value)
    if layout is None or layout.axis == value.dim() - 1:
        raise Mixing("it works within the example axis")
    if layout.axis == value.dim() - 2:
        window = math.prod(call.argument("kernel_size"))
        if layout.after % window:
            raise Mixing("it adds up the windows of several examples")
        return Layout(layout.axis, layout.before, layout.after // window)
    return layout


def sampled(call: OpCall) -> Result:
    """`grid_sampler`: `[N, C, *sizes]` at the places `[N, *places, rank]`."""
    value, grid = call.argument("input"), call.argument("grid")
    found = []
    if layout := call.layout(value):
        if layout.axis >= 2:
            raise Mixing("it samples along the example axis")
        found.append(layout)
    if layout := call.layout(grid):
        if layout.axis == grid.dim() - 1:
            raise Mixing("it samples along the example axis")
        found.append(layout if layout.axis == 0 else at_axis(layout, layout.axis + 1))
    return agree(found)


def batch_only(call: OpCall) -> Result:
    """Every argument that has examples has them on axis 0, and so has every result."""
    layout = agree([call.layout(tensor) for tensor in call.tensors])
    if layout is not None and layout.axis != 0:
        raise Mixing("it works within the example axis")
    return layout


def norm_over(axes: Callable[[OpCall, Tensor], set[int]]) -> AxisRule:
    """Normalisations: (result, mean, deviation), statistics over some axes."""

    def rule(call: OpCall) -> Result:
        value = call.argument("input")
        layout = call.layout(value)
        if layout is None:
            raise Unknown("it is a normalisation whose scale or shift depends on the examples")
        if layout.axis in axes(call, value):
            raise Mixing("it normalises over the example axis")
        found: list[Followed] = [layout]
        return found + [layout if t.dim() > layout.axis else OPAQUE for t in call.results[1:]]

    return rule


def normalized_axes(call: OpCall, value: Tensor) -> set[int]:
    """The axes that a layer norm or RMS norm runs over."""
    rank = len(call.argument("normalized_shape"))
    return set(range(value.dim() - rank, value.dim()))


def all_but_first(_call: OpCall, value: Tensor) -> set[int]:
    """The axes that a group norm runs over, or keeps apart by their group."""
    return set(range(1, value.dim()))


def batch_norm(training: bool | None = None) -> AxisRule:
    """Batch norm: in training over all axes but that of channels, else over none.

    Args:
        training: Whether it is in training; None: an argument says so.
    """

    def rule(call: OpCall) -> Result:
        value = call.argument("input")
        layout = call.layout(value)
        uses_batch = call.argument("training") if training is None else training
        for name in ("weight", "bias", "running_mean", "running_var"):
            channels = call.layout(call.argument(name))
            if layout is None or (channels is not None and at_axis(channels, 1) != layout):
                raise Unknown("it is a normalisation whose scale, shift or statistics depend on the examples")
        assert layout is not None
        if uses_batch and layout.axis != 1:
            raise Mixing("it normalises over the example axis")
        if uses_batch and call.argument("running_mean") is not None:
            raise Mixing("it keeps running statistics of the examples")
        found: list[Followed] = [layout]
        return found + [OPAQUE] * (len(call.results) - 1)

    return rule
