"""Second runs: what the cuts between segments keep for them, and what the clip node gets from them.

Promises: a segment that is run again computes what it has computed before, or it is an error: the same nodes run in the
same order, on the same values, with the same random numbers and parameters, and the sums of the result are compared.
Its sites leave the factors that they have left before, which are weighted and summed as those that others hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ModeError
from perexfx.ir.factors import Factors
from perexfx.ir.node import info_of
from perexfx.ir.site import Key
from perexfx.planning.reruns import Rerun
from perexfx.runtime.digests import Trace
from perexfx.runtime.generators import random_state_kept
from perexfx.runtime.pull_back import check_unchanged
from perexfx.runtime.tape import Tape

# What cuts keep


@dataclass(frozen=True)
class AtCut:
    """What a backward finds at a cut.

    Attributes:
        gradient: Of the value there, and what tells it from others, where a rerun ends; None where it has none.
        values: What the segment after it reads, by name, where it is to run again.
        trace: What tells the value from others, where a rerun ends.
        states: Of the random number generators of CPU and device, where a rerun begins.
        settings: Of the modules that it calls, where a rerun begins.
    """

    gradient: tuple[Tensor, Trace] | None
    values: Mapping[str, Any]
    trace: Trace | None
    states: tuple[Tensor, ...]
    settings: Mapping[str, Mapping[str, Any]]


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
        ctx.trace = Trace.of(value, segments[at - 1].layout_of_exit) if found.ends else None
        ctx.states = _states(value.device) if found.begins else ()
        assert tape.owner is not None
        ctx.settings = _settings_of(tape.owner, found.modules)
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
        if ctx.trace is not None and gradient is not None:
            assert tape.plan is not None
            kept = gradient, Trace.of(gradient, tape.plan.segments[ctx.at - 1].layout_of_exit)
        tape.at_cuts[ctx.at] = AtCut(kept, values, ctx.trace, ctx.states, ctx.settings)
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
    named = dict(zip(tape.state.segments[at].given, given, strict=True)) if given else {}
    return _Cut.apply(tape, at, token, value, {name: named[name] for name in tape.cuts[at].keeps})


# What comes of them


class SecondTape(Tape):
    """The tape of a rerun, on which sites leave their factors to be summed at once.

    Attributes:
        first: The tape of the forward that is run again.
        weighted_sum: Group -> the clipped sum of factors.
        sums: (site, operand) -> its clipped sum.
    """

    def __init__(self, first: Tape, rerun: Rerun, weighted_sum: Callable[[str, Factors], Tensor]) -> None:
        super().__init__(first.state, first.plan, first.n)
        self.first, self.left_alone, self.cuts = first, first.left_alone, {}
        self.active, self.weighted_sum = first.active, weighted_sum
        keys = rerun.keys & first.reweighted
        self.operands = {site: frozenset(name for at, name in keys if at == site) for site in first.operands}
        self.sums: dict[Key, Tensor] = {}

    def is_trained(self, site: str) -> bool:
        """As in the first forward."""
        return self.first.is_trained(site)

    def enter_backward(self) -> None:
        """Nothing is left behind by others."""

    def add(self, site: str, factors: Mapping[str, Factors]) -> None:
        """Sums what a site leaves, where it was asked for."""
        group = self.state.site(site).group
        for name in self.operands[site]:
            self.sums[site, name] = self.weighted_sum(group, factors[name])


def sums_again(
    tape: Tape, rerun: Rerun, weighted_sum: Callable[[str, Factors], Tensor], lost: Tensor
) -> Mapping[Key, Tensor]:
    """The clipped sums of what is run again: (site, operand) -> gradient of its value.

    Args:
        tape: Of the forward; the backward has passed the cuts.
        rerun: What to run.
        weighted_sum: Group and factors -> their clipped sum.
        lost: Which examples are not finite. Shape `[B]`.

    Raises:
        ModeError: The second forward does not give what the first gave.
    """
    plan = tape.plan
    assert plan is not None
    check_unchanged(tape, tape.versions)
    last, end = plan.segments[rerun.last], tape.at_cuts.pop(rerun.last + 1)
    second = SecondTape(tape, rerun, weighted_sum)
    token = torch.zeros(tape.n, device=lost.device, requires_grad=True)
    begin, values = tape.at_cuts[rerun.first], dict[str, Any]()
    layers = f"from `{plan.segments[rerun.first].sites[0]}` to `{last.sites[-1]}`"
    assert tape.owner is not None
    _check_settings(begin.settings, tape.owner, layers)
    for at in range(rerun.first, rerun.last + 1):
        values |= tape.at_cuts.pop(at).values
    states = begin.states
    del begin
    with _random_numbers_of(states, token.device), torch.enable_grad():
        result = _run(second, token, values, rerun, last.exit)
    assert end.trace is not None
    _check_same(end.trace, Trace.of(result, last.layout_of_exit), lost, layers)
    if end.gradient is not None:
        gradient, trace = end.gradient
        if bool((trace.differs(Trace.of(gradient, last.layout_of_exit)) & ~lost).any()):
            raise ModeError(
                f"The gradient that arrives at `{last.exit}` was overwritten by a backward below, and is needed for "
                f"the second one of the layers {layers}. Let that backward return a new tensor, or name another "
                "strategy than 'reweight' for them."
            )
        torch.autograd.grad(result, token, gradient, allow_unused=True)
    return second.sums


def _run(tape: SecondTape, token: Tensor, values: dict[str, Any], rerun: Rerun, wanted: str) -> Tensor:
    """The value of the last node of some segments.

    Args:
        tape: In the place of the first.
        token: In the place of all tokens.
        values: Name of a node -> its value: what is given. Empty afterwards.
        rerun: Which segments.
        wanted: Name of the node.
    """
    owner = tape.first.owner
    assert owner is not None
    graph = owner.graph
    assert isinstance(graph, fx.Graph)
    nodes = _nodes_of(graph, rerun)
    last_reader = {name: node for node in nodes for name in map(_name_of, node.all_input_nodes)} | {wanted: None}

    def value_of(read: fx.Node) -> Any:
        name = _name_of(read)
        return values[name] if name in values else _stand_in(tape, token, read)

    for node in nodes:
        args, kwargs = node.args, dict(node.kwargs)
        if info_of(node).role == "site":  # whose parameter expressions are not evaluated again
            args = (*args[:3], tuple(() for _ in tape.state.site(str(args[2])).operands), *args[4:])
        given: Any
        given, kwargs = fx.map_arg((args, kwargs), value_of)
        values[node.name] = _call(owner, node, given, kwargs)
        del given, kwargs
        for name in (node.name, *map(_name_of, node.all_input_nodes)):
            if last_reader.get(name, node) is node:
                values.pop(name, None)
    return values.pop(wanted)


def _name_of(read: fx.Node) -> str:
    """Name of a node; where it is what comes out of a cut, of what goes in."""
    if info_of(read).role != "cut":
        return read.name
    through, at = read.args[:2]
    assert isinstance(through, fx.Node)
    value = through.args[1 if at == 0 else 3]
    assert isinstance(value, fx.Node)
    return _name_of(value)


def _nodes_of(graph: fx.Graph, rerun: Rerun) -> list[fx.Node]:
    """The nodes of some segments that compute something, in order."""
    found: list[fx.Node] = []
    at = -1
    for node in graph.nodes:
        role = info_of(node).role
        if node.target is cut:
            at += 1
        elif rerun.first <= at <= rerun.last and role not in ("cut", "norm") and node.op not in ("get_attr", "output"):
            found.append(node)
    return found


def _stand_in(tape: SecondTape, token: Tensor, node: fx.Node) -> Any:
    """What a rerun takes in the place of tape, tokens and parameters."""
    role = info_of(node).role
    if role == "tape":
        return tape
    if role in ("norm", "cut") or node.args[1] == 0:
        return token
    clip, at = node.args
    assert isinstance(clip, fx.Node)
    assert isinstance(at, int)
    names: Any = clip.args[1]
    return tape.first.parameters[names[at - 1]]


def _call(owner: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_module":
        return owner.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


# Whether it is the same


def _check_same(known: Trace, found: Trace, lost: Tensor, layers: str) -> None:
    """Raises: ModeError, where a second run has given another value."""
    differs = known.differs(found) & ~lost
    if bool(differs.any()):
        raise ModeError(
            f"The layers {layers} were run a second time for their clipped sums, and gave other values than before for "
            f"{int(differs.sum())} of {len(differs)} examples. Something in them depends on more than their inputs. "
            "Raise `memory_budget`, or name another strategy than 'reweight' for them."
        )


def _settings_of(owner: nn.Module, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Path of a module -> its modes and numbers, and how many hooks it has."""
    found = {}
    for path in paths:
        attributes = vars(owner.get_submodule(path)).items()
        plain = {name: value for name, value in attributes if isinstance(value, bool | int | float | str | tuple)}
        hooks = {name: len(value) for name, value in attributes if name.endswith("_hooks") and value}
        found[path] = plain | hooks
    return found


def _check_settings(known: Mapping[str, Mapping[str, Any]], owner: nn.Module, layers: str) -> None:
    """Raises: ModeError, where a module has other settings than it had."""
    found = _settings_of(owner, list(known))
    changed = [path for path, before in known.items() if before != found[path]]
    if changed:
        raise ModeError(
            f"Module `{changed[0]}` was changed between the forward and the backward, which runs the layers {layers} a "
            "second time. Change it after the backward, or name another strategy than 'reweight' for them."
        )


# Random numbers


def _states(device: torch.device) -> tuple[Tensor, ...]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return tuple(states)


@contextmanager
def _random_numbers_of(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """With the generators as they were; afterwards they are as before."""
    with random_state_kept([device]):
        torch.set_rng_state(states[0])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(states[1], device)
        yield


__all__ = ["AtCut", "SecondTape", "cut", "sums_again"]
