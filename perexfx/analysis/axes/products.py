"""Products: of matrices, vectors, kernels, queries and keys.

Promises: as in `call.py`. No product is summed over examples, and no example is multiplied with another.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from perexfx.analysis.axes.call import (
    OPAQUE,
    AxisRule,
    Mixing,
    OpCall,
    Result,
    Unknown,
    agree,
    at_axis,
    from_right,
    without_axes,
)
from perexfx.ir.layout import Layout

Axes = Sequence[int | None]
"""Where each axis of a factor is in the product; None where products are summed over it."""


def product(left: tuple[str, Axes], right: tuple[str, Axes], bias: str = "") -> AxisRule:
    """A product of two values of fixed ranks, plus one that is broadcast from the right.

    Args:
        left: Name of the argument, and where its axes go.
        right: The same of the other factor.
        bias: Name of what is added, or "".
    """

    def rule(call: OpCall) -> Result:
        found: list[Layout] = []
        for name, axes in (left, right):
            if layout := call.layout(call.argument(name)):
                axis = axes[layout.axis]
                if axis is None:
                    raise Mixing("it sums products over the example axis")
                found.append(at_axis(layout, axis))
        _refuse_pairs(found, "multiplies")
        if bias:
            added, rank = call.argument(bias), call.results[0].dim()
            if layout := call.layout(added):
                found.append(from_right(layout, added.dim(), rank))
        return agree(found)

    return rule


def _refuse_pairs(factors: Sequence[Layout], verb: str) -> None:
    """The examples of one factor must not be on another axis of the product than those of the other."""
    if len({layout.axis for layout in factors}) > 1:
        raise Mixing(f"it {verb} every example with every other")


def distances(call: OpCall) -> Result:
    """`[.., P, M]` and `[.., R, M]` to `[.., P, R]`: every row of one against every row of the other."""
    rank = call.results[0].dim()
    found = []
    for name, axis in (("x1", rank - 2), ("x2", rank - 1)):
        value = call.argument(name)
        if layout := call.layout(value):
            from_end = value.dim() - layout.axis
            if from_end == 1:
                raise Mixing("it sums over the example axis")
            found.append(at_axis(layout, axis if from_end == 2 else rank - from_end))
    _refuse_pairs(found, "compares")
    return agree(found)


def trilinear(call: OpCall) -> Result:
    """The product of three values, each with axes put in, summed over some: what `bilinear` is made of."""
    found = []
    for value, inserted in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        if layout := call.layout(call.argument(value)):
            axis = layout.axis
            for new in sorted(call.argument(inserted)):
                axis += new <= axis
            found.append(at_axis(layout, axis))
    _refuse_pairs(found, "multiplies")
    layout = agree(found)
    summed = set(call.argument("sumdim"))
    if layout is not None and layout.axis in summed:
        raise Mixing("it sums products over the example axis")
    return layout and without_axes(layout, summed)


def convolution(batch_axis: int = 0) -> AxisRule:
    """Convolutions, transposed or not: the examples are the batch."""

    def rule(call: OpCall) -> Result:
        if call.layout(call.argument("weight")) or call.layout(call.argument("bias")):
            raise Unknown("it is a convolution whose kernel depends on the examples")
        layout = call.layout(call.tensors[0])
        if layout is not None and layout.axis != batch_axis:
            raise Mixing("it convolves over the example axis")
        return layout

    return rule


def attention(call: OpCall) -> Result:
    """`[.., heads, positions, features]`: everything happens within the last two axes."""
    tensors = [call.argument(name) for name in ("query", "key", "value")]
    layouts = [call.layout(tensor) for tensor in tensors]
    rank = tensors[0].dim()
    for name in ("attn_mask", "attn_bias"):
        mask = call.argument(name)
        if isinstance(mask, Tensor) and (layout := call.layout(mask)):
            layouts.append(from_right(layout, mask.dim(), rank))
    layout = agree(layouts)
    if layout is not None and layout.axis >= rank - 2:
        raise Mixing("it attends over the example axis")
    return [layout if tensor.dim() > 1 else OPAQUE for tensor in call.results]


def matrices(vectors: str = "") -> AxisRule:
    """Linear algebra on the last two axes of every argument; the axes before them are broadcast.

    Args:
        vectors: An argument that may have one axis only besides those.
    """

    def rule(call: OpCall) -> Result:
        own = {id(tensor): 2 for tensor in call.tensors}
        value = call.argument(vectors) if vectors else None
        if isinstance(value, Tensor):
            own[id(value)] = 1
        leading = max(tensor.dim() - own[id(tensor)] for tensor in call.tensors)
        found = []
        for tensor in call.tensors:
            if layout := call.layout(tensor):
                if layout.axis >= tensor.dim() - own[id(tensor)]:
                    raise Mixing("it works within the example axis")
                found.append(at_axis(layout, layout.axis + leading - tensor.dim() + own[id(tensor)]))
        return agree(found)

    return rule


def solution(call: OpCall) -> Result:
    """`solve(A, B)`: as `matrices`, but B is a batch of vectors where its shape is A's without the last axis."""
    left, right = call.argument("A"), call.argument("B")
    is_vector = right.dim() == 1 or (right.dim() == left.dim() - 1 and right.shape == left.shape[:-1])
    return matrices("B" if is_vector else "")(call)


def recurrent_layer(call: OpCall) -> Result:
    """One LSTM layer as a kernel: `[T, N, D]` and states `[N, H]`; constant states are the same for all."""
    names = {"input": 1, "hx_": 0, "cx_": 0}
    found = []
    for name, axis in names.items():
        if layout := call.layout(call.argument(name)):
            if layout.axis != axis:
                raise Mixing("it runs along the example axis")
            found.append(at_axis(layout, 1))
    layout = agree(found)
    if layout is None:
        raise Unknown("it is a recurrent layer whose weights depend on the examples")
    return [layout, at_axis(layout, 0), at_axis(layout, 0), OPAQUE]


def own_recurrent_layer(call: OpCall) -> Result:
    """Perexfx's own: `[T, N, D]` and states `[N, H]`, over time along axis 0."""
    if any(call.layout(parameter) for parameter in call.argument("parameters")):
        raise Unknown("it is a recurrent layer whose weights depend on the examples")
    states = call.argument("states")
    of_states = [found for state in states if (found := call.layout(state))]
    of_input = call.layout(call.argument("input"))
    if any(layout.axis != 0 for layout in of_states) or (of_input is not None and of_input.axis != 1):
        raise Mixing("it runs along the example axis")
    layout = agree([of_input, *(at_axis(found, 1) for found in of_states)])
    assert layout is not None
    return [layout, *[at_axis(layout, 0)] * len(states)]


def recurrent_network(call: OpCall) -> Result:
    """A whole recurrent network as a kernel: `[T, N, D]` or `[N, T, D]`, and states `[layers, N, H]`."""
    if call.argument("batch_sizes"):
        raise Unknown("it is a recurrent layer on packed sequences")
    batch_axis = 0 if call.argument("batch_first") else 1
    found = []
    for name, axis in (("input", batch_axis), ("hx", 1), ("cx", 1)):
        if layout := call.layout(call.argument(name)):
            if layout.axis != axis:
                raise Mixing("it runs along the example axis")
            found.append(at_axis(layout, 1))
    layout = agree(found)
    if layout is None:
        raise Unknown("it is a recurrent layer whose weights depend on the examples")
    return [at_axis(layout, batch_axis), layout, layout, OPAQUE, OPAQUE]


def recurrent_cell(call: OpCall) -> Result:
    """One step of an LSTM or GRU as a kernel: `[N, gates]` and states `[N, H]`."""
    layout = agree([call.layout(tensor) for tensor in call.tensors])
    if layout is not None and layout.axis != 0:
        raise Mixing("it runs along the example axis")
    return layout
