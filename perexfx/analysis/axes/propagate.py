"""From where the arguments of one call carry examples to where its results do.

Promises: the layout of every result, or `Mixing` where one example's result would depend on others. Examples in an
argument that a rule overlooks, and results whose size does not fit their layout, are refused. An operation without a
rule is probed.
"""

from __future__ import annotations

from typing import Any

import torch

from perexfx.analysis.axes.call import AxisRule, Followed, Mixing, OpCall, Unknown
from perexfx.analysis.axes.elementwise import pointwise
from perexfx.analysis.axes.indexing import COUNTS
from perexfx.analysis.axes.probe import probe
from perexfx.analysis.axes.table import OWN_RULES, RULES
from perexfx.ir.layout import Layout


def propagate(call: OpCall) -> list[Followed]:
    """Where each tensor of the result carries its examples.

    Raises:
        Mixing: The result of one example depends on others.
        Unknown: It cannot be said.
    """
    results = call.results
    if not results:
        return []
    if call.counting and call.name.removesuffix("_") not in COUNTS:
        raise Mixing("it combines examples with a value that depends on their number or position")
    _refuse_hidden_writes(call)
    rule = rule_of(call.func)
    if rule is None:
        return probe(call)
    found = rule(call)
    for tensor in call.tensors:
        if id(tensor) in call.layouts and id(tensor) not in call.consulted:
            raise Unknown(f"perexfx does not follow examples in the argument `{call.name_of(tensor)}` of `{call.name}`")
    followed = found if isinstance(found, list) else [found] * len(results)
    return [_fitting(call, tensor, place) for tensor, place in zip(results, followed, strict=True)]


def rule_of(func: Any) -> AxisRule | None:
    """The rule for an overload; None where there is none."""
    namespace, name = func._schema.name.split("::")
    if namespace == "perexfx":
        return OWN_RULES.get(name)
    if namespace != "aten":
        return None
    for candidate in (name, name.removesuffix("_"), name.removesuffix("_copy")):
        if candidate in RULES:
            return RULES[candidate]
    return pointwise if torch.Tag.pointwise in func.tags else None


def _refuse_hidden_writes(call: OpCall) -> None:
    """What is written must be returned, or nobody would follow it."""
    if call.argument("training") is False:
        return  # running statistics are read only
    results = {id(tensor) for tensor in call.results}
    for parameter in call.func._schema.arguments:
        if parameter.alias_info is None or not parameter.alias_info.is_write:
            continue
        if parameter.kwarg_only:
            raise Unknown(f"it writes its result into `{parameter.name}=`; use what it returns instead")
        written = call.argument(parameter.name)
        if isinstance(written, torch.Tensor) and id(written) not in results and id(written) not in call.layouts:
            raise Unknown(f"it writes examples into its argument `{parameter.name}`")


def _fitting(call: OpCall, tensor: torch.Tensor, place: Followed) -> Followed:
    """A layout that fits the size of its result."""
    if not isinstance(place, Layout):
        return place
    if tensor.numel() == 0 and tensor.dim() <= 1:
        return None
    if place.axis >= tensor.dim() or tensor.shape[place.axis] != place.repeats * call.n:
        raise Unknown("the size of its result does not follow the number of examples")
    return place
