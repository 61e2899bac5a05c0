"""The second backward at run time: what the cuts between segments keep, and what the clip node makes of it.

Promises: a segment that is run again computes what it has computed before, or it is an error: by the same nodes, from
the same values, with the same random numbers, and the sums of its result are compared. Its gradients enter weighted, so
that what reaches the parameters are clipped sums. Where examples are not finite, the rows of one that is stand for
them, with gradients of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from perexfx.ir.layout import Layout
from perexfx.ir.node import info_of
from perexfx.ir.site import Key
from perexfx.pull_back import value_of
from perexfx.segments import Rerun
from perexfx.tape import Tape


@dataclass(frozen=True)
class AtCut:
    """What a backward finds at a cut.

    Attributes:
        gradient: Of the value there, where a rerun ends.
        values: What the segment after it reads, by name, where it is to run again.
        sums: Of the value and of its absolutes, per example; where a rerun ends.
        states: Of the random number generators of CPU and device; where a rerun begins.
    """

    gradient: Tensor | None
    values: Mapping[str, Any]
    sums: tuple[Tensor, Tensor] | None
    states: tuple[Tensor, ...]


class _Cut(Function):
    """Identity on the value between two segments. What reruns need is saved as all else is for a backward."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, at: int, _token: Tensor, value: Tensor, kept: Mapping[str, Any]) -> Tensor:
        assert tape.plan is not None
        cut = tape.plan.cuts[at]
        leaves, ctx.spec = pytree.tree_flatten(dict(kept))
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.are_tensors = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.save_for_backward(*[leaf for leaf in leaves if isinstance(leaf, Tensor)])
        ctx.tape, ctx.at = tape, at
        ctx.sums = _sums_of(value, tape.plan.segments[at - 1].layout_of_exit) if cut.ends else None
        ctx.states = _states(value.device) if cut.is_random else ()
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        tape: Tape = ctx.tape
        tape.enter_backward()
        saved = iter(ctx.saved_tensors)
        pairs = zip(ctx.are_tensors, ctx.others, strict=True)
        leaves = [next(saved).detach() if is_tensor else other for is_tensor, other in pairs]
        values = pytree.tree_unflatten(leaves, ctx.spec)
        (gradient,) = grad_outputs
        is_needed = ctx.sums is not None
        tape.at_cuts[ctx.at] = AtCut(gradient if is_needed else None, values, ctx.sums, ctx.states)
        return None, None, None, gradient, None


def cut(tape: Tape, token: Tensor, at: int, value: Any, *given: Any) -> Any:
    """The value between two segments.

    Args:
        tape: Of this forward.
        token: From the clip node.
        at: Number of the segment after it.
        value: What gradients pass through; the token before the first segment.
        given: The values that the segment after it reads, in its order.
    """
    if at not in tape.cuts:
        return value
    found = tape.cuts[at]
    named = dict(zip(tape.state.segments[at].given, given, strict=True)) if given else {}
    return _Cut.apply(tape, at, token, value, {name: named[name] for name in found.keeps})


class SecondTape(Tape):
    """The tape of a rerun: sites leave sums for it, of gradients that arrive weighted.

    Attributes:
        first: The tape of the forward that is run again.
        ones: The weight of each example. Shape `[B]`.
        sums: (site, operand) -> gradient of its value.
    """

    def __init__(self, first: Tape, rerun: Rerun, ones: Tensor) -> None:
        super().__init__(first.state, first.plan, first.n)
        self.first, self.left_alone, self.cuts = first, first.left_alone, {}
        self.active, self.ones = first.active, ones
        keys = rerun.keys & first.reweighted
        self.operands = {site: frozenset(name for at, name in keys if at == site) for site in first.operands}
        self.sums: dict[Key, Tensor] = {}

    def is_trained(self, site: str) -> bool:
        """As in the first forward."""
        return self.first.is_trained(site)

    def enter_backward(self) -> None:
        """Nothing is left behind by others."""

    def add(self, site: str, factors: Mapping[str, Factors]) -> None:
        """Sums what a site leaves."""
        for name in self.operands[site]:  # a rule may leave others
            self.sums[site, name] = factors[name].weighted_sum(self.ones)


def sums_again(tape: Tape, rerun: Rerun, weights: Tensor, lost: Tensor | None) -> Mapping[Key, Tensor]:
    """The clipped sums of what is run again: (site, operand) -> gradient of its value.

    Args:
        tape: Of the forward; the backward has passed the cuts.
        rerun: What to run.
        weights: The clip factors. Shape `[B]`.
        lost: Which examples are not finite; None: none.

    Raises:
        ModeError: The second forward does not give what the first gave.
    """
    plan, keys = tape.plan, rerun.keys & tape.reweighted
    assert plan is not None
    if not keys:
        return {}
    if lost is not None and bool(lost.all()):
        operands = {key: tape.state.operand(key).expression for key in keys}
        return {key: torch.zeros_like(value_of(tape, key, operand)) for key, operand in operands.items()}
    segments = plan.segments[rerun.first : rerun.last + 1]
    values: dict[str, Any] = {}
    for at, segment in enumerate(segments, start=rerun.first):
        for name, value in tape.at_cuts[at].values.items():
            values[name] = _finite(value, segment.layouts[name], lost)
    layout, end = segments[-1].layout_of_exit, tape.at_cuts.pop(rerun.last + 1)
    assert end.gradient is not None
    assert end.sums is not None
    weighted, sums = _weighted(end.gradient, layout, weights, lost), end.sums
    del end
    second = SecondTape(tape, rerun, torch.ones_like(weights))
    token = torch.zeros_like(weights).requires_grad_()
    with _random_numbers_of(tape.at_cuts[rerun.first].states, token.device), torch.enable_grad():
        result = _run(second, token, values, rerun.first, segments[-1].exit)
    _check_same(_sums_of(result.detach(), layout), sums, lost, segments[0].sites[0], segments[-1].sites[-1])
    torch.autograd.grad(result, token, weighted, allow_unused=True)
    return second.sums


def _run(tape: SecondTape, token: Tensor, values: dict[str, Any], first: int, wanted: str) -> Tensor:
    """The value of a node of the rewritten graph.

    Args:
        tape: In the place of the first.
        token: In the place of all tokens.
        values: Name of a node -> its value: what is given. Empty afterwards.
        first: Number of the first segment.
        wanted: Name of the node.
    """
    graph = tape.state.owner.graph
    assert isinstance(graph, fx.Graph)
    needed: list[fx.Node] = []
    last_reader: dict[str, str] = {wanted: ""}
    for node in reversed(graph.nodes):
        if node.name not in last_reader or node.name in values:
            continue
        if node.target is cut and node.args[2] == first:
            entry = node.args[3]
            assert isinstance(entry, fx.Node)
            values[node.name] = token if first == 0 else values[entry.name]
            continue
        role = info_of(node).role
        if role in ("tape", "norm", "clip"):
            values[node.name] = _stand_in(tape, token, node, role)
            continue
        needed.append(node)
        for read in node.all_input_nodes:
            last_reader.setdefault(read.name, node.name)
    result: Any = None
    for node in reversed(needed):
        result = _call(tape.state.owner, node, values)
        values[node.name] = result
        for read in node.all_input_nodes:
            if last_reader[read.name] == node.name:
                del values[read.name]
    values.clear()
    return result


def _stand_in(tape: SecondTape, token: Tensor, node: fx.Node, role: str) -> Any:
    """What a rerun takes in the place of tape, tokens and parameters."""
    if role == "tape":
        return tape
    if role == "norm" or node.args[1] == 0:
        return token
    clip, at = node.args
    assert isinstance(clip, fx.Node)
    assert isinstance(at, int)
    names: Any = clip.args[1]
    return tape.first.parameters[names[at - 1]]


def _call(owner: nn.Module, node: fx.Node, values: Mapping[str, Any]) -> Any:
    args: Any
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda read: values[read.name])
    if node.op == "call_module":
        return owner.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


# Examples: weighted, left out, compared


def _finite(value: Any, layouts: Sequence[Layout | None], lost: Tensor | None) -> Any:
    """A value with the rows of a finite example in place of those that are lost."""
    if lost is None:
        return value
    rows = torch.arange(len(lost), device=lost.device)
    rows = rows.masked_fill(lost, int((~lost).nonzero()[0]))
    given = iter(layouts)

    def taken(tensor: Tensor) -> Tensor:
        layout = next(given)
        if layout is None:
            return tensor
        apart = _apart(tensor, layout)
        return apart.index_select(layout.axis + 1, rows).flatten(layout.axis, layout.axis + 2)

    return pytree.tree_map_only(Tensor, taken, value)


def _weighted(gradient: Tensor, layout: Layout, weights: Tensor, lost: Tensor | None) -> Tensor:
    apart = _apart(gradient, layout)
    shape = [-1, *[1] * (apart.dim() - layout.axis - 2)]
    if lost is not None:
        apart = apart.masked_fill(lost.view(shape), 0)
    return (apart * weights.to(apart.dtype).view(shape)).flatten(layout.axis, layout.axis + 2)


def _apart(value: Tensor, layout: Layout) -> Tensor:
    """A value with its examples on an axis of their own, the one after `layout.axis`."""
    n = value.shape[layout.axis] // layout.repeats
    return value.unflatten(layout.axis, (layout.before, n, layout.after))


def _sums_of(value: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Per example the sum of its numbers, and of their absolutes. Shape `[B]`."""
    apart = _apart(value, layout)
    others = [axis for axis in range(apart.dim()) if axis != layout.axis + 1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    return apart.sum(others, dtype=dtype), torch.linalg.vector_norm(apart, 1, others, dtype=dtype)


def _check_same(
    found: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], lost: Tensor | None, first: str, last: str
) -> None:
    (total, _), (known, size) = found, before
    is_close = (total - known).abs() <= torch.finfo(size.dtype).eps ** 0.5 * size
    differs = ~(is_close | (total == known) | (total.isnan() & known.isnan()))
    if lost is not None:
        differs = differs & ~lost
    if bool(differs.any()):
        raise ModeError(
            f"The layers from `{first}` to `{last}` were run a second time for their clipped sums, and did not give "
            f"what they gave before ({int(differs.sum())} of {len(size)} examples differ). Something in them depends "
            "on more than their inputs. Raise `memory_budget`, or name another strategy than 'reweight' for them."
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
    if not states:
        yield
        return
    is_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if is_cpu else [device], device_type="cuda" if is_cpu else device.type):
        torch.set_rng_state(states[0])
        if not is_cpu:
            torch.get_device_module(device).set_rng_state(states[1], device)
        yield


__all__ = ["AtCut", "SecondTape", "cut", "sums_again"]
