"""Operations that work entry by entry, and those whose result has the shape of an argument.

Promises: as in `call.py`. Values are broadcast from the right; those with examples must have them in the same
place, and none is stretched over the examples of another.
"""

from __future__ import annotations

from torch import Tensor

from perexfx.analysis.axes.call import (
    OPAQUE,
    AxisRule,
    Mixing,
    OpCall,
    Result,
    agree,
    at_axis,
    from_right,
)
from perexfx.ir.layout import Layout


def pointwise(call: OpCall) -> Result:
    """Broadcasting from the right; every value with examples must have them in the same place."""
    return broadcast(call, call.tensors, call.results[0])


def broadcast(call: OpCall, values: list[Tensor], result: Tensor) -> Layout | None:
    """Where values that are broadcast together to a result carry their examples."""
    tensors = [tensor for tensor in values if call.layout(tensor)]
    rank = result.dim()
    layout = agree([from_right(call.layouts[id(t)], t.dim(), rank) for t in tensors])
    if layout is None:
        return None
    for tensor in tensors:
        at = layout.axis - rank + tensor.dim()
        if tensor.shape[at] != result.shape[layout.axis]:
            raise Mixing("it broadcasts one example's values over others")
    for tensor in values:
        at = layout.axis - rank + tensor.dim()
        if not call.layout(tensor) and at >= 0 and tensor.shape[at] not in (1, result.shape[layout.axis]):
            raise Mixing("it broadcasts the example axis")
    return layout


def loss(call: OpCall) -> Result:
    """Losses between values of one shape; only those that are not reduced keep examples apart."""
    _refuse_reduction(call)
    return pointwise(call)


def class_loss(call: OpCall) -> Result:
    """Losses of `[N, C, ...]` scores and targets that lack the axis of classes, or have it too."""
    _refuse_reduction(call)
    scores, target = call.argument("self"), call.argument("target")
    layout = call.layout(scores)
    found = []
    if layout is not None:
        if layout.axis == min(1, scores.dim() - 1):
            raise Mixing("it runs over the example axis as if it were the axis of classes")
        found.append(_without_classes(layout))
    if targets := call.layout(target):
        if target.dim() == scores.dim():
            if targets.axis == 1:
                raise Mixing("it runs over the example axis as if it were the axis of classes")
            targets = _without_classes(targets)
        found.append(targets)
    _, *others = call.results
    layout = agree(found)
    return [layout] + [call.layout(target) if other.shape == target.shape else OPAQUE for other in others]


def _without_classes(layout: Layout) -> Layout:
    return at_axis(layout, layout.axis - (1 if layout.axis > 1 else 0))


def _refuse_reduction(call: OpCall) -> None:
    if call.argument("reduction") != 0:
        raise Mixing("it reduces over the example axis")


def like_first(call: OpCall) -> Result:
    """The result has the first tensor's shape, and what it holds of it stays where it is."""
    return call.layout(call.tensors[0])


def no_examples(call: OpCall) -> Result:
    """The result reads no values, only sizes; where it has an example axis its size says so."""
    call.consulted.update(id(tensor) for tensor in call.tensors)
    return None


def against_all(elements: str, others: str, how: str) -> AxisRule:
    """Each entry of one argument is compared with every entry of another, which must carry no examples."""

    def rule(call: OpCall) -> Result:
        if call.layout(call.argument(others)):
            raise Mixing(how)
        return call.layout(call.argument(elements))

    return rule
