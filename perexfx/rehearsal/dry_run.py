"""Rehearsing: what an ordinary and a clipped step hold at every moment, with fake tensors.

Promises: nothing is computed, and the module and its state are left as they are. It is noted when each site hands over
its factors, in which storages they lie, when the clip node has summed them, and where the step passes from one segment
to the next. The loss is not known; it is taken for a cross-entropy over the last axis.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from perexfx import kernels
from perexfx.analysis import FakeInterpreter, fake_inputs, leaves_of
from perexfx.capture import TRACING, quiet, same_einsums
from perexfx.ir.alternative import Alternative
from perexfx.ir.cost import Cost
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.inputs import Inputs, arguments_for
from perexfx.ir.site import Key
from perexfx.planning import Choice, Plan, total_bytes
from perexfx.rehearsal.library_memory import hidden_bytes, workspace_bytes
from perexfx.rehearsal.peak import HandedOver, Passages, Passed, Rehearsal
from perexfx.rehearsal.timeline import Span, Timeline
from perexfx.runtime import Runtime, StepOptions
from perexfx.sites import Segment

_logger = logging.getLogger("perexfx")


@dataclass(frozen=True)
class Rehearsed:
    """The memory of the plans for one kind of input, by rehearsal: one each for two batch sizes, when first asked.

    Where a step cannot be rehearsed, what a choice holds is taken, which is more.

    Attributes:
        runtime: Of the transformed module.
        inputs: The kind of input.
    """

    runtime: Runtime
    inputs: Inputs

    def bytes_added(self, plan: Plan, choice: Choice) -> int:
        """By how many bytes the peak of a step grows with a choice: one alternative per decision of the plan."""
        rehearsal = self._rehearsal(plan)
        if rehearsal is None:
            return total_bytes(choice)
        return rehearsal.bytes_added({(d.site, d.operand): a for d, a in zip(plan.decisions, choice, strict=True)})

    def ordinary_bytes(self, plan: Plan) -> int | None:
        """The peak of an ordinary step; None where it cannot be rehearsed."""
        rehearsal = self._rehearsal(plan)
        return None if rehearsal is None else rehearsal.ordinary_bytes

    def _rehearsal(self, plan: Plan) -> Rehearsal | None:
        notes, n = self.runtime.notes.of(_Rehearsals), plan.batch_size
        known = notes.setdefault((self.inputs, plan.channels_last), _Rehearsals()).of_batch_sizes
        if n not in known:
            first, second = (*known.values(), None, None)[:2]
            found = first.between(second, n) if first and second else None
            if found is None:
                try:
                    owner = self.runtime.owner
                    assert isinstance(owner, fx.GraphModule)
                    found = rehearse(owner, self.runtime, plan, self.inputs)
                except Exception as error:  # whatever a model does with fake tensors
                    _logger.info("The step cannot be rehearsed; its memory is overestimated: %s", error)
            if len(known) >= REHEARSALS_KEPT:
                del known[list(known)[2]]
            known[n] = found
        return known[n]


NEVER = sys.maxsize

REHEARSALS_KEPT = 8
"""Of one kind of input; from the first two the others follow."""


@dataclass
class _Rehearsals:
    """What is known of one kind of input and one choice of regions: batch size -> rehearsal, or that there is none."""

    of_batch_sizes: dict[int, Rehearsal | None] = field(default_factory=dict)


def rehearse(gm: fx.GraphModule, runtime: Runtime, plan: Plan, inputs: Inputs) -> Rehearsal:
    """What an ordinary and a clipped step hold, from running them with fake tensors.

    Args:
        gm: The transformed module.
        runtime: Its state.
        plan: For the batch size; what it chose does not matter.
        inputs: The kind of input.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with TRACING, same_einsums(), runtime.rehearsed(), quiet(), kernels.for_sizes():
        given = fake_inputs(fake, inputs, runtime.settings.batch_dim, plan.batch_size)
        ordinary = _Recorder()
        _step(gm, runtime.captured.graph, fake, given, ordinary)
        clipped = _Recorder()
        with runtime.stepping(StepOptions({(inputs, plan.batch_size): _watched(plan, clipped)})):
            passages = _step(gm, gm.graph, fake, given, clipped, plan.segments)
    return Rehearsal(
        plan.batch_size, ordinary.timeline(), clipped.timeline(), clipped.handed_over(), plan.segments, passages
    )


def _step(
    gm: fx.GraphModule,
    graph: fx.Graph,
    fake: FakeTensorMode,
    given: Mapping[str, Tensor],
    recorder: _Recorder,
    segments: Sequence[Segment] = (),
) -> Passages:
    """Forward, loss and backward; where they pass from one segment to the next."""
    interpreter = _Passing(gm, graph, fake, recorder, segments)
    parameters = [value for value in interpreter.fetch_attributes() if value.requires_grad]
    with fake:
        recorder.ignore([*given.values(), *interpreter.converted.values()])
        with recorder, torch.enable_grad():
            loss = _loss(interpreter.run(*arguments_for(graph, given)))
            interpreter.env.clear()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            results = recorder.storages_of(gradients)
            del loss, gradients
    return interpreter.passages(results)


class _Passing(FakeInterpreter):
    """Notes when the values between segments come, when their gradients do, and where what segments read lies."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        fake: FakeTensorMode,
        recorder: _Recorder,
        segments: Sequence[Segment],
    ) -> None:
        super().__init__(module, graph, fake, trains=True)
        self.recorder = recorder
        self.exits = {segment.exit for segment in segments}
        self.read = {name for segment in segments for name in segment.given}
        self.cuts: dict[str, Passed] = {}
        self.values: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        value = super().run_node(n)
        if n.name in self.read:
            self.values[n.name] = self.recorder.storages_of(value)
        if n.name in self.exits:
            self.cuts[n.name] = Passed(self.recorder.next_tick(), NEVER, ())
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(self._note_gradient, n.name))
        return value

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        found = self.recorder.storages_of(gradient)
        self.cuts[name] = replace(self.cuts[name], backward=self.recorder.next_tick(), gradient=found)

    def passages(self, results: Sequence[int]) -> Passages:
        """All that was noted."""
        ends = {name: replace(cut, backward=min(cut.backward, self.recorder.tick)) for name, cut in self.cuts.items()}
        return Passages(ends, self.values, frozenset(results))


def _loss(output: Any) -> Tensor:
    """A cross-entropy over the last axis of everything that has a gradient."""
    parts = []
    for value in leaves_of(output):
        if not value.is_floating_point() or not value.requires_grad:
            continue
        if value.dim() < 2:
            parts.append(value.sum())
            continue
        logits = value.flatten(0, -2)
        parts.append(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=value.device)))
    return torch.stack(parts).sum()


class _Recorder(TorchDispatchMode):
    """Notes when every storage comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.tick = 0
        self.spans: list[Span] = []
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._ignored: set[int] = set()
        self._handed: dict[Key, tuple[int, tuple[int, ...]]] = {}
        self._summed: dict[Key, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in leaves_of(result):
            self._note(tensor)
        if workspace := workspace_bytes(func, args):
            at, _ = self._alive[_address(leaves_of(result)[-1])]
            self.spans[at] = self.spans[at]._replace(bytes=workspace)
        if hidden := hidden_bytes(func, args, result):
            self.spans.append(Span(self.next_tick(), self.tick + 1, hidden))
        return result

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """What is there before the step."""
        self._ignored |= {_address(tensor) for tensor in tensors}

    def _note(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._alive or address in self._ignored:
            return
        at, storage = len(self.spans), tensor.untyped_storage()
        self.spans.append(Span(self.next_tick(), -1, storage.nbytes()))
        self._alive[address] = at, weakref.ref(storage, lambda _: self._gone(address))

    def _gone(self, address: int) -> None:
        at, _ = self._alive.pop(address)
        self.spans[at] = self.spans[at]._replace(end=self.next_tick())

    def next_tick(self) -> int:
        """A tick of its own."""
        self.tick += 1
        return self.tick

    def storages_of(self, value: Any) -> tuple[int, ...]:
        """Where the tensors of a value lie, as far as the step has made them."""
        places = (self._alive.get(_address(tensor)) for tensor in leaves_of(value))
        return tuple(dict.fromkeys(place[0] for place in places if place is not None))

    def hand_over(self, key: Key, factors: Factors) -> None:
        """Notes that a site has left its factors."""
        self._handed[key] = self.next_tick(), self.storages_of(factors)

    def sum_up(self, key: Key, total: Tensor) -> None:
        """Notes that the clip node has summed a site's factors."""
        at, _ = self._alive[_address(total)]
        self._summed[key] = self.next_tick(), at

    def handed_over(self) -> dict[Key, HandedOver]:
        """What was handed over, by (site, operand)."""
        found = {}
        for key, (at, storages) in self._handed.items():
            until, total = self._summed[key]
            found[key] = HandedOver(at, until, storages, total)
        return found

    def timeline(self) -> Timeline:
        """All storages; those that are still there live to the end."""
        end = self.tick + 1
        return Timeline(end, tuple(s._replace(end=end) if s.end < 0 else s for s in self.spans))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class _Watch:
    """A strategy that notes what it is given, and keeps nothing of it."""

    key: Key
    recorder: _Recorder
    name: str = "watch"

    def refuses(self, signature: Signature) -> str | None:
        """Nothing."""
        return None

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """None."""
        return Cost((), 0)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Zeros."""
        self.recorder.hand_over(self.key, factors)
        numbers = next(tensor for tensor in leaves_of(factors) if tensor.is_floating_point())
        left = _Left(self.key, self.recorder, factors.signature, numbers.dtype)
        return numbers.new_zeros(factors.signature.n, dtype=torch.promote_types(numbers.dtype, torch.float32)), left


@dataclass(frozen=True)
class _Left:
    """What is left of factors that were watched: their sizes."""

    key: Key
    recorder: _Recorder
    signature: Signature
    dtype: torch.dtype

    def gradients(self) -> Tensor:
        """Not asked for: no gradients are kept in a rehearsal."""
        raise AssertionError("a rehearsal keeps no per-example gradients")

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Zeros of the parameter's shape."""
        total = weights.new_zeros(self.signature.shape, dtype=self.dtype)
        self.recorder.sum_up(self.key, total)
        return total

    def without(self, dropped: Tensor) -> _Left:
        """The same."""
        return self


def _watched(plan: Plan, recorder: _Recorder) -> Plan:
    """The plan with every strategy watched instead of carried out."""
    decisions = tuple(
        replace(d, chosen=Alternative(_Watch((d.site, d.operand), recorder), 0.0, Cost((), 0))) for d in plan.decisions
    )
    return replace(plan, decisions=decisions)


__all__ = ["Rehearsed", "rehearse"]
