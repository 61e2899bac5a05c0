"""The runtime's state of a transformed module: what stands behind `gm.perexfx`.

Promises: what is known of an input kind is analyzed once, and planned once per batch size; a call that the graph does
not hold for is an error before anything is computed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from perexfx.analysis import Analysis
from perexfx.capture import Captured, check_call
from perexfx.ir.errors import ModeError
from perexfx.ir.inputs import Inputs, named_leaves
from perexfx.ir.site import Site
from perexfx.planning import Plan
from perexfx.runtime.call_checks import check_trains
from perexfx.runtime.notes import Notes
from perexfx.runtime.settings import Settings
from perexfx.runtime.step_options import StepOptions
from perexfx.runtime.tape import LastBackward, Results, Tape
from perexfx.sites import Region, Segment, SiteTable

Planner = Callable[["Runtime", nn.Module, Inputs, int], Plan]
"""Runtime, transformed module, kind of input and batch size to the plan."""

PLANS_KEPT = 256
"""Plans remembered, for this many kinds of input and batch sizes; the oldest is made again when it is needed."""


class Runtime:
    """What a transformed module knows, and what its steps leave behind.

    Attributes:
        sites: Every use of a trainable parameter, by name and by group.
        regions: The parts of the graph whose images may lie with their channels last.
        segments: The parts of the graph that a plan may have run a second time.
        settings: What `transform` was asked for.
        captured: The graph in functional form, and what it holds for.
        trainable: Names of the parameters that were trainable when the model was transformed.
        frozen: Names of those that were not.
        plan: The plan of the last forward, or the one made ahead of time; None before there is one.
        kind: The kind of input that `plan` is for.
        plans: Kind of input and batch size -> plan, of all that were made.
        results: What the last backward found.
        notes: What others remember about the module.
        last: Which backward has reached a clip node last.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        regions: Sequence[Region],
        segments: Sequence[Segment],
        settings: Settings,
        captured: Captured,
        trainable: Sequence[str],
        frozen: Sequence[str],
        planner: Planner,
    ) -> None:
        self.sites = SiteTable(sites)
        self.regions, self.segments = tuple(regions), tuple(segments)
        self.settings, self.captured = settings, captured
        self.trainable, self.frozen = tuple(trainable), tuple(frozen)
        self.plan: Plan | None = None
        self.kind: Inputs | None = None
        self.plans: dict[tuple[Inputs, int], Plan] = {}
        self.results = Results()
        self.notes = Notes()
        self._planner = planner
        self._options = StepOptions()
        self._analyses: dict[Inputs, Analysis] = {}
        self._owner: weakref.ref[nn.Module] | None = None
        self._carriers: tuple[bool, ...] | None = None
        self.last = LastBackward()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the link to the module, which that restores, and what is known of past inputs."""
        new = {"_owner": None, "_analyses": {}, "plans": {}, "notes": Notes(), "last": LastBackward()}
        return {**self.__dict__, **new}

    def replica(self) -> Runtime:
        """Of a replica of the module, whose steps are its own."""
        found = copy.copy(self)
        found.__dict__.update({**self.__dict__, "results": Results(), "last": LastBackward()})
        return found

    def belongs_to(self, module: nn.Module) -> None:
        """Links to the transformed module, whose parameters the analysis reads."""
        self._owner = weakref.ref(module)

    @property
    def owner(self) -> nn.Module:
        """The transformed module."""
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            raise ModeError("`gm.perexfx` was taken out of its module, or the module no longer exists.")
        return owner

    def begin(self, names: Sequence[str], values: Sequence[Any]) -> Tape:
        """The tape of one forward: checks that the graph is right for this call, and looks up or makes the plan.

        Args:
            names: Of the graph's inputs.
            values: What it was called with.
        """
        arguments = named_leaves(dict(zip(names, values, strict=True)))
        check_call(self.captured, self.owner, arguments)
        if not torch.is_grad_enabled():
            return self._tape(None, 0)
        check_trains(self.owner, self.frozen)
        kind, n = self.kind_of(arguments)
        followed = self._options.plans.get((kind, n)) or self.plans.get((kind, n)) or self.prepare(kind, n)
        self.plan, self.kind = followed, kind
        return self._tape(self.plan, n)

    def _tape(self, plan: Plan | None, n: int) -> Tape:
        tape = Tape(self.sites, self.settings, self._options, plan, n, results=self.results, last=self.last)
        tape.owner = self.owner if tape.cuts else None
        return tape

    @contextmanager
    def stepping(self, options: StepOptions) -> Iterator[None]:
        """Hands options to the steps that begin inside."""
        before, self._options = self._options, options
        try:
            yield
        finally:
            self._options = before

    def kind_of(self, arguments: Mapping[str, Any]) -> tuple[Inputs, int]:
        """The kind of some inputs, by name, and their batch size."""
        return Inputs.of(arguments, self.settings.batch_dim, self._carriers)

    @contextmanager
    def set_aside(self, **instead: Any) -> Iterator[None]:
        """What is set, planned, or left behind by a backward in the meantime is undone.

        Args:
            instead: Attributes that have another value in the meantime.
        """
        before, found = dict(self.__dict__), replace(self.results)
        self._analyses, self.plans = dict(self._analyses), {}
        self.results.leave(None, None)
        try:
            for name, value in instead.items():
                setattr(self, name, value)
            yield
        finally:
            self.__dict__.clear()
            self.__dict__.update(before)
            self.results.leave(found.norms, found.clip_factors)

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """The same, for runs without numbers: a clipping function of the user's might keep what it is given, so flat
        clipping takes its place.
        """
        flat = replace(self.settings, clipping="flat", clip_norm=1.0)
        with self.set_aside(settings=flat if callable(self.settings.clipping) else self.settings):
            yield

    @contextmanager
    def results_kept(self) -> Iterator[None]:
        """What steps inside find, and what they were planned by, is not what is shown afterwards."""
        before, found = (self.plan, self.kind), replace(self.results)
        self.results.leave(None, None)
        try:
            yield
        finally:
            self.plan, self.kind = before
            self.results.leave(found.norms, found.clip_factors)

    def prepare(self, kind: Inputs, n: int) -> Plan:
        """Makes the plan for one kind of input and batch size, and remembers it."""
        return self.follow(kind, n, self._planner(self, self.owner, kind, n))

    def follow(self, kind: Inputs, n: int, plan: Plan) -> Plan:
        """Remembers a plan, as that of the last step."""
        self.plan, self.kind = plan, kind
        while len(self.plans) >= PLANS_KEPT:
            del self.plans[next(iter(self.plans))]
        self.plans[kind, n] = plan
        return plan

    def known(self, kind: Inputs) -> Analysis | None:
        """The analysis for one kind of input, where one was made."""
        return self._analyses.get(kind)

    def remember(self, kind: Inputs, analysis: Analysis) -> None:
        """Keeps an analysis, and which inputs carry examples: later sizes may agree by accident."""
        self._analyses[kind] = analysis
        self._carriers = kind.carriers


__all__ = ["Planner", "Runtime"]
