"""Refusals that need no shapes: batch statistics, and trainable tensors that are not parameters.

Promises: whatever is refused here is refused at once, with all its places, before anything is analyzed.
"""

from __future__ import annotations

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from perexfx.ir.errors import CoverageError, MixingError
from perexfx.ir.node import place_of
from perexfx.ir.refusal import Place, Refusal


def refuse_batch_statistics(graph: fx.Graph, module: nn.Module) -> None:
    """Refuses what normalises by batch statistics, which needs no shapes to be recognised.

    Args:
        graph: In functional form.
        module: Holds the layers that it was recorded in.

    Raises:
        MixingError: All of them, by name.
    """
    refusals = []
    of_inputs: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or of_inputs.intersection(node.all_input_nodes):
            of_inputs.add(node)
        if node not in of_inputs or not _uses_batch_statistics(node):
            continue
        place = place_of(node)
        if node.target is F.batch_norm:
            what = "BatchNorm in training mode: its statistics are those of the whole batch"
            why = "Every example's output then depends on all others, and no example has a gradient of its own."
        else:
            what = "InstanceNorm with running statistics in training mode: it keeps means over the whole batch"
            why = "What it has kept changes how later examples are evaluated, and no clipping bounds that."
        refusals.append(
            Refusal(
                what=f"{place} is {what}.",
                why=why,
                remedy=_remedy(module, place),
                place=place,
            )
        )
    if refusals:
        raise MixingError(refusals)


def _remedy(module: nn.Module, place: Place) -> str:
    if not isinstance(module.get_submodule(place.module), _BatchNorm | _InstanceNorm):
        return (
            "`perexfx.replace_batchnorm` cannot replace a call of a function: write a normalisation of each example, "
            "as `torch.nn.functional.group_norm`, or pass running statistics and not to use others."
        )
    freeze = f"model.get_submodule({place.module!r}).eval()" if place.module else "model.eval()"
    return (
        f"Replace module `{place.module}` by GroupNorm with `perexfx.replace_batchnorm(model)`, which does so for all "
        f"such layers, or freeze its statistics with `{freeze}` before the transform."
    )


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
