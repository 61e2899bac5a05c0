"""A captured forward, and whether it holds for one call.

Promises: a call that it does not hold for is an error before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from perexfx.capture.conditions import Conditions
from perexfx.ir.errors import ArgumentError, ModeError


@dataclass(frozen=True)
class Captured:
    """A captured forward.

    Attributes:
        graph: Functional form; parameters and buffers are `get_attr` nodes.
        fixed_modes: Modules (path -> training flag) whose mode was baked into the graph: it is right in this mode only.
        constants: Tensors that the forward makes out of numbers, by the name that `get_attr` nodes give them.
        baked: Arguments that are no tensors, and the value that the graph is specialised to.
        conditions: What the graph demands of its inputs besides.
    """

    graph: fx.Graph
    fixed_modes: Mapping[str, bool]
    constants: Mapping[str, Tensor]
    baked: Mapping[str, Any]
    conditions: Conditions = field(default_factory=Conditions)


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


__all__ = ["Captured", "check_call"]
