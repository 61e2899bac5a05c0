"""Whether a captured graph holds for one call of it.

Promises: a call that it does not hold for is an error before anything is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perexfx.capture import Captured
from perexfx.ir.errors import ArgumentError, ModeError


def check_call(captured: Captured, owner: nn.Module, arguments: Mapping[str, Any]) -> None:
    """That the graph holds for these arguments and for the modes of the modules.

    Args:
        captured: The graph, and what it was captured for.
        owner: The transformed module.
        arguments: By name, as `named_leaves` gives them.

    Raises:
        ArgumentError: An argument is another than the one that the graph was captured with.
        ModeError: A module is in the other mode.
    """
    _check_baked(captured, arguments)
    captured.conditions.check(arguments)
    _check_modes(captured, owner)


def check_trains(owner: nn.Module, frozen: Iterable[str]) -> None:
    """That what this call leaves for a backward can be clipped.

    Args:
        owner: The transformed module.
        frozen: Names of the parameters that were not trainable when the model was transformed.

    Raises:
        ModeError: Autocast is on, or one of them is trainable now.
    """
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise ModeError(
            "Autocast is on around the transformed model: its gradients would be of mixed precision, which perexfx "
            "does not cover. Switch it off, or convert the model to the dtype you want."
        )
    for name in frozen:
        if operator.attrgetter(name)(owner).requires_grad:
            raise ModeError(
                f"Parameter `{name}` was frozen when the model was transformed and is trainable now: its gradient "
                "would not be clipped. Transform the model again, or freeze it."
            )


def _check_baked(captured: Captured, arguments: Mapping[str, Any]) -> None:
    for name, baked in captured.baked.items():
        value = arguments.get(name, baked)
        if value is None and callable(baked):  # was left out: a graph's code has None in such places
            continue
        if value is not baked and (isinstance(value, Tensor) or value != baked):
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ArgumentError(
                f"Argument `{name}` was {baked!r} when the model was transformed, and the graph holds for that "
                f"alone. Found {found}. Pass `example_inputs` with `{name}` as you call the model to `transform`."
            )


def _check_modes(captured: Captured, owner: nn.Module) -> None:
    for path, training in captured.fixed_modes.items():
        if owner.get_submodule(path).training is not training:
            mode, other = ("train", "eval") if training else ("eval", "train")
            raise ModeError(
                f"Module `{path or type(owner).__name__}` computes something else in {other} mode, and the graph "
                f"was captured in {mode} mode. Call `.{mode}()` on it before the forward, use the original model "
                f"for {other} mode, or transform the model again in {other} mode."
            )


__all__ = ["check_call", "check_trains"]
