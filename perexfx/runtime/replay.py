"""Replay: running segments of the graph a second time, for the clipped sums of their sites.

Promises: a segment that is run again computes what it has computed before, or it is an error: the same nodes run in the
same order, on the same values, with the same random numbers and parameters, and the sums of the result are compared.
Its sites leave the factors that they have left before, which are weighted and summed as those that others hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from perexfx.ir.errors import ModeError
from perexfx.ir.factors import Factors
from perexfx.ir.node import info_of
from perexfx.ir.site import Key
from perexfx.planning import Rerun
from perexfx.runtime.cuts import cut, settings_of
from perexfx.runtime.digests import Digest
from perexfx.runtime.pull_back import check_unchanged
from perexfx.runtime.random_state import random_state_kept
from perexfx.runtime.tape import ReceivingTape, Tape


class SecondTape(ReceivingTape):
    """The tape of a rerun, on which sites leave their factors to be summed at once.

    Attributes:
        first: The tape of the forward that is run again.
        weighted_sum: Group -> the clipped sum of factors.
        sums: (site, operand) -> its clipped sum.
    """

    def __init__(self, first: Tape, rerun: Rerun, weighted_sum: Callable[[str, Factors], Tensor]) -> None:
        super().__init__(
            first.sites,
            first.settings,
            first.options,
            first.plan,
            first.n,
            results=first.results,
            last=first.last,
        )
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
        group = self.sites.site(site).group
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
    assert end.digest is not None
    _check_same(end.digest, Digest.of(result, last.layout_of_exit), lost, layers)
    if end.gradient is not None:
        gradient, digest = end.gradient
        if bool((digest.differs(Digest.of(gradient, last.layout_of_exit)) & ~lost).any()):
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
            args = (*args[:3], tuple(() for _ in tape.sites.site(str(args[2])).operands), *args[4:])
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


def _check_same(known: Digest, found: Digest, lost: Tensor, layers: str) -> None:
    """Raises: ModeError, where a second run has given another value."""
    differs = known.differs(found) & ~lost
    if bool(differs.any()):
        raise ModeError(
            f"The layers {layers} were run a second time for their clipped sums, and gave other values than before for "
            f"{int(differs.sum())} of {len(differs)} examples. Something in them depends on more than their inputs. "
            "Raise `memory_budget`, or name another strategy than 'reweight' for them."
        )


def _check_settings(known: Mapping[str, Mapping[str, Any]], owner: nn.Module, layers: str) -> None:
    """Raises: ModeError, where a module has other settings than it had."""
    found = settings_of(owner, list(known))
    changed = [path for path, before in known.items() if before != found[path]]
    if changed:
        raise ModeError(
            f"Module `{changed[0]}` was changed between the forward and the backward, which runs the layers {layers} a "
            "second time. Change it after the backward, or name another strategy than 'reweight' for them."
        )


# Random numbers


@contextmanager
def _random_numbers_of(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """With the generators as they were; afterwards they are as before."""
    with random_state_kept([device]):
        torch.set_rng_state(states[0])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(states[1], device)
        yield


__all__ = ["SecondTape", "sums_again"]
