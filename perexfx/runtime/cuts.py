"""Cuts: what lies between two segments of a graph, and keeps for a second run what it needs.

Promises: identity on token and value, forward and backward; what is kept is saved as autograd saves all else for a
backward, and is there only where the plan has a rerun that asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from perexfx.runtime.digests import Digest
from perexfx.runtime.tape import AtCut, Tape


class _Cut(Function):
    """Identity on token and value. What reruns need is saved as all else is for a backward.

    The sites above have the token that comes out, so that their squared norms pass here whatever else does.
    """

    @staticmethod
    def forward(ctx: Any, tape: Tape, at: int, token: Tensor, value: Tensor, kept: Mapping[str, Any]) -> Any:
        assert tape.plan is not None
        found, segments = tape.cuts[at], tape.plan.segments
        leaves, ctx.spec = pytree.tree_flatten(dict(kept))
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.are_tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.save_for_backward(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])
        ctx.tape, ctx.at = tape, at
        ctx.digest = Digest.of(value, segments[at - 1].layout_of_exit) if found.ends else None
        ctx.states = _states_of(value.device) if found.begins else ()
        assert tape.owner is not None
        ctx.settings = settings_of(tape.owner, found.modules)
        ctx.set_materialize_grads(False)
        is_returned = at == len(segments)  # and may be changed in place
        return token.view_as(token), value.clone() if is_returned else value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        tape: Tape = ctx.tape
        tape.enter_backward()
        saved = iter(ctx.saved_tensors)
        pairs = zip(ctx.are_tensors, ctx.others, strict=True)
        leaves = [next(saved).detach() if is_tensor else other for is_tensor, other in pairs]
        values = pytree.tree_unflatten(leaves, ctx.spec)
        squared, gradient = grad_outputs
        kept = None
        if ctx.digest is not None and gradient is not None:
            assert tape.plan is not None
            kept = gradient, Digest.of(gradient, tape.plan.segments[ctx.at - 1].layout_of_exit)
        tape.at_cuts[ctx.at] = AtCut(kept, values, ctx.digest, ctx.states, ctx.settings)
        return None, None, squared, gradient, None


def cut(tape: Tape, token: Tensor, at: int, value: Any, *given: Any) -> tuple[Tensor, Any]:
    """The token for what lies above, and the value between two segments.

    Args:
        tape: Of this forward.
        token: From the clip node, or the cut before.
        at: Number of the segment after it.
        value: What gradients pass through; before the first segment the token again.
        given: The values that the segment after it reads, in its order.
    """
    if at not in tape.cuts:
        return token, value
    assert tape.plan is not None
    named = dict(zip(tape.plan.segments[at].given, given, strict=True)) if given else {}
    return _Cut.apply(tape, at, token, value, {name: named[name] for name in tape.cuts[at].keeps})


def settings_of(owner: nn.Module, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Path of a module -> its modes and numbers, and how many hooks it has."""
    found = {}
    for path in paths:
        attributes = vars(owner.get_submodule(path)).items()
        plain = {name: value for name, value in attributes if isinstance(value, bool | int | float | str | tuple)}
        hooks = {name: len(value) for name, value in attributes if name.endswith("_hooks") and value}
        found[path] = plain | hooks
    return found


def _states_of(device: torch.device) -> tuple[Tensor, ...]:
    """Of the random number generators of the CPU and of a device."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return tuple(states)


__all__ = ["cut", "settings_of"]
