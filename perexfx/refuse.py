"""Refusals that need no shapes: batch statistics, and trainable tensors that are not parameters.

Promises: whatever is refused here is refused at once, with all its places, before anything is analyzed.
"""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from perexfx.ir.errors import CoverageError, MixingError
from perexfx.ir.node import place_of
from perexfx.ir.refusal import Refusal


def refuse_batch_statistics(graph: fx.Graph) -> None:
    """Refuses layers that normalise by batch statistics, which need no shapes to be recognised.

    Raises:
        MixingError: All of them, by name.
    """
    refusals = []
    for node in graph.nodes:
        if not _uses_batch_statistics(node):
            continue
        place = place_of(node)
        layer = "BatchNorm" if node.target is F.batch_norm else "InstanceNorm with running statistics"
        refusals.append(
            Refusal(
                what=f"{place} is {layer} in training mode: its statistics are those of the whole batch.",
                why="Every example's output then depends on all others, and no example has a gradient of its own.",
                remedy=f"Replace module `{place.module}` by GroupNorm, or freeze its statistics with "
                f"`model.get_submodule({place.module!r}).eval()` before the transform.",
                place=place,
            )
        )
    if refusals:
        raise MixingError(refusals)


def refuse_other_trainables(graph: fx.Graph, module: nn.Module) -> None:
    """Refuses tensors that autograd would give a gradient and that are not parameters: it would not be clipped.

    Raises:
        CoverageError: All of them, by name.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    refusals = []
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in parameters:
            continue
        value = operator.attrgetter(str(node.target))(module)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            refusals.append(
                Refusal(
                    what=f"{place_of(node)} is a tensor that requires a gradient and is not a parameter.",
                    why="Its gradient would not be clipped.",
                    remedy=f"Make `{node.target}` an nn.Parameter, or call `requires_grad_(False)` on it.",
                    place=place_of(node),
                )
            )
    if refusals:
        raise CoverageError(refusals)


def _uses_batch_statistics(node: fx.Node) -> bool:
    if isinstance(node.target, str) or node.target not in (F.batch_norm, F.instance_norm):
        return False
    call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    call.apply_defaults()
    if node.target is F.batch_norm:
        return bool(call.arguments["training"])
    return bool(call.arguments["use_input_stats"]) and call.arguments["running_mean"] is not None
