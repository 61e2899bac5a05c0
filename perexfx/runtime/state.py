"""The state that `transform` adds to a model: `gm.perexfx`.

Promises: what is known of an input kind is analyzed once, and planned once per batch size; a call that the graph does
not hold for is an error before anything is computed.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perexfx.analysis.analyze import Analysis
from perexfx.capture.forward import Captured
from perexfx.ir.errors import ArgumentError, ModeError
from perexfx.ir.inputs import Inputs, named_leaves
from perexfx.ir.site import Key, Operand, Site, are_joined, grouped
from perexfx.ir.strategy import REWEIGHT
from perexfx.planning.plan import Plan
from perexfx.planning.reruns import Rerun
from perexfx.runtime.tape import Tape
from perexfx.sites.regions import Region
from perexfx.sites.segments import Segment

if TYPE_CHECKING:
    from perexfx.inspecting.profile import Profile
    from perexfx.inspecting.proof.verify import Proof
    from perexfx.rehearsal.step_memory import Rehearsal

Clipping = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What the user asked `transform` for; see there."""

    clip_norm: float | None
    clipping: Clipping
    loss_reduction: str
    strategy: str | Mapping[str, str]
    memory_budget: int | None
    batch_dim: int
    cost_model: str

    @property
    def may_reweight(self) -> bool:
        """Whether a plan may run parts of the graph a second time: under a memory budget, or where it is asked for."""
        asked = self.strategy.values() if isinstance(self.strategy, Mapping) else (self.strategy,)
        return self.memory_budget is not None or REWEIGHT in asked


Planner = Callable[["PerExample", nn.Module, Inputs, int], Plan]


PLANS_KEPT = 256
"""Plans remembered, for this many kinds of input and batch sizes; the oldest is made again when it is needed."""


class PerExample(nn.Module):
    """What `transform` adds to a model: `gm.perexfx`.

    Attributes:
        sites: Every use of a trainable parameter, in graph order.
        regions: The parts of the graph whose images may lie with their channels last.
        segments: The parts of the graph that a plan may have run a second time.
        groups: The sites that share parameters, by the name of the first.
        plans: Kind of input and batch size -> plan, of all that were made.
        proofs: Kind of input and batch size -> what `perexfx.verify` has proved of its plan.
        profiles: Kind of input and batch size -> what `perexfx.profile` has measured.
        rehearsals: Kind of input and regions with channels last -> batch size -> what a step holds at every moment.
        joined: Names of the groups whose per-example gradients must be added before their norm is taken.
        evaluated: Names of the parameters whose expressions are evaluated again in a backward.
        settings: What `transform` was asked for.
        plan: The plan of the last forward, or the one made ahead of time; None before there is one.
        kind: The kind of input that `plan` is for.
        norms: Gradient norm of each example of the last backward, before clipping. Shape `[B]`.
        keep_gradients: Keep each example's gradients too, B times the memory of the parameters.
        one_by_one: Let sites share nothing, so that each can be timed.
        around_rerun: The context that a second run of segments runs in, so that it can be timed.
        gradients: Then, after a backward: parameter name -> gradient of each example's own loss, `[B, *shape]`.
        clip_factors: What each example's gradient was multiplied with. Shape `[B]`; with `clipping="per_layer"`
            `[groups, B]`, a row per group of sites that share parameters, in graph order.
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
        super().__init__()
        self.sites = tuple(sites)
        self.regions = tuple(regions)
        self.segments = tuple(segments)
        self.settings = settings
        self.captured = captured
        self.trainable, self.frozen = tuple(trainable), tuple(frozen)
        self.plan: Plan | None = None
        self.kind: Inputs | None = None
        self.norms: Tensor | None = None
        self.clip_factors: Tensor | None = None
        self.keep_gradients = False
        self.one_by_one = False
        self.around_rerun: Callable[[Rerun], AbstractContextManager[Any]] = nullcontext
        self.gradients: dict[str, Tensor] | None = None
        self._planner = planner
        self._analyses: dict[Inputs, Analysis] = {}
        self.plans: dict[tuple[Inputs, int], Plan] = {}
        self.rehearsals: dict[tuple[Inputs, frozenset[int]], dict[int, Rehearsal | None]] = {}
        self.proofs: dict[tuple[Inputs, int], Proof] = {}
        self.profiles: dict[tuple[Inputs, int], Profile] = {}
        self.groups = grouped(self.sites)
        self.joined = frozenset(name for name, members in self.groups.items() if are_joined(members))
        self.evaluated = frozenset(
            name
            for site in self.sites
            for operand in site.operands
            if operand.expression.function is not None
            for name in operand.expression.parameters
        )
        self._by_name = {site.name: site for site in self.sites}
        self._active: tuple[frozenset[str], dict[str, frozenset[str]]] | None = None
        self._owner: weakref.ref[nn.Module] | None = None
        self._carriers: tuple[bool, ...] | None = None
        self._backward_seen = -1

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the link to the module, which that restores, and what is known of past inputs."""
        return {
            **self.__dict__,
            "_owner": None,
            "_analyses": {},
            "plans": {},
            "rehearsals": {},
            "proofs": {},
            "profiles": {},
        }

    def extra_repr(self) -> str:
        """A line for `print(gm)`."""
        return f"{len(self.sites)} sites, clip_norm={self.settings.clip_norm}, clipping={self.settings.clipping!r}"

    def belongs_to(self, module: nn.Module) -> None:
        """Links to the transformed module, whose parameters the analysis reads."""
        self._owner = weakref.ref(module)

    def site(self, name: str) -> Site:
        """A site by name."""
        return self._by_name[name]

    def operand(self, key: Key) -> Operand:
        """An operand of a site."""
        return next(operand for operand in self.site(key[0]).operands if operand.name == key[1])

    def is_alone(self, group: str) -> bool:
        """Whether a group is one site."""
        return len(self.groups[group]) == 1

    @property
    def takes_together(self) -> bool:
        """Whether small gradients may wait for the clip node: nothing asks for them, or for norms, one by one."""
        return self.settings.clipping != "per_layer" and not self.keep_gradients and not self.one_by_one

    def active_operands(self, parameters: frozenset[str]) -> Mapping[str, frozenset[str]]:
        """Site -> names of its operands that depend on some of these parameters."""
        if self._active is None or self._active[0] != parameters:
            found = {
                site.name: frozenset(o.name for o in site.operands if parameters.intersection(o.expression.parameters))
                for site in self.sites
            }
            self._active = parameters, found
        return self._active[1]

    @property
    def owner(self) -> nn.Module:
        """The transformed module."""
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            raise ModeError("`gm.perexfx` was taken out of its module, or the module no longer exists.")
        return owner

    def forward(self, names: tuple[str, ...], *values: Any) -> Tape:
        """The tape of one forward: checks that the graph is right for this call, and looks up or makes the plan."""
        arguments = named_leaves(dict(zip(names, values, strict=True)))
        self._check_baked(arguments)
        self.captured.conditions.check(arguments)
        self._check_modes()
        if not torch.is_grad_enabled():
            return Tape(self, None, 0)
        self._check_trainable()
        kind, n = self.kind_of(arguments)
        self.plan, self.kind = self.plans.get((kind, n)) or self.prepare(kind, n), kind
        return Tape(self, self.plan, n)

    def kind_of(self, arguments: Mapping[str, Any]) -> tuple[Inputs, int]:
        """The kind of some inputs, by name, and their batch size."""
        return Inputs.of(arguments, self.settings.batch_dim, self._carriers)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """What is set, planned, or left behind by a backward in the meantime is undone."""
        before = dict(self.__dict__)
        self._analyses, self.plans = dict(self._analyses), {}
        try:
            yield
        finally:
            self.__dict__.clear()
            self.__dict__.update(before)

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """The same, for runs without numbers: a clipping function of the user's might keep what it is given, so flat
        clipping takes its place.
        """
        with self.set_aside():
            if callable(self.settings.clipping):
                self.settings = replace(self.settings, clipping="flat", clip_norm=1.0)
            yield

    def prepare(self, kind: Inputs, n: int) -> Plan:
        """Makes the plan for one kind of input and batch size, and remembers it."""
        self.plan, self.kind = self._planner(self, self.owner, kind, n), kind
        while len(self.plans) >= PLANS_KEPT:
            del self.plans[next(iter(self.plans))]
        self.plans[kind, n] = self.plan
        return self.plan

    def known(self, kind: Inputs) -> Analysis | None:
        """The analysis for one kind of input, where one was made."""
        return self._analyses.get(kind)

    def remember(self, kind: Inputs, analysis: Analysis) -> None:
        """Keeps an analysis, and which inputs carry examples: later sizes may agree by accident."""
        self._analyses[kind] = analysis
        self._carriers = kind.carriers

    def claim_backward(self) -> None:
        """Notes that this backward reached the clip node of one forward.

        Raises:
            ModeError: It has reached that of another forward already.
        """
        task = torch._C._current_graph_task_id()
        if task == self._backward_seen:
            raise ModeError(
                "One backward reached two forwards of the transformed model. Which of their rows are the same example "
                "is not known, so their gradients cannot be clipped together. Call `backward()` once per forward "
                "(gradients accumulate), or make both calls inside one module and transform that."
            )
        self._backward_seen = task

    def _check_baked(self, arguments: Mapping[str, Any]) -> None:
        for name, baked in self.captured.baked.items():
            value = arguments.get(name, baked)
            if value is None and callable(baked):  # was left out: a graph's code has None in such places
                continue
            if value is not baked and (isinstance(value, Tensor) or value != baked):
                found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ArgumentError(
                    f"Argument `{name}` was {baked!r} when the model was transformed, and the graph holds for that "
                    f"alone. Found {found}. Pass `example_inputs` with `{name}` as you call the model to `transform`."
                )

    def _check_modes(self) -> None:
        owner = self.owner
        for path, training in self.captured.fixed_modes.items():
            if owner.get_submodule(path).training is not training:
                mode, other = ("train", "eval") if training else ("eval", "train")
                raise ModeError(
                    f"Module `{path or type(owner).__name__}` computes something else in {other} mode, and the graph "
                    f"was captured in {mode} mode. Call `.{mode}()` on it before the forward, use the original model "
                    f"for {other} mode, or transform the model again in {other} mode."
                )

    def _check_trainable(self) -> None:
        if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
            raise ModeError(
                "Autocast is on around the transformed model: its gradients would be of mixed precision, which perexfx "
                "does not cover. Switch it off, or convert the model to the dtype you want."
            )
        owner = self.owner
        for name in self.frozen:
            if operator.attrgetter(name)(owner).requires_grad:
                raise ModeError(
                    f"Parameter `{name}` was frozen when the model was transformed and is trainable now: its gradient "
                    "would not be clipped. Transform the model again, or freeze it."
                )


def state_of(gm: nn.Module) -> PerExample:
    """The state of a transformed module.

    Raises:
        ArgumentError: It is not a transformed module.
    """
    state = getattr(gm, "perexfx", None)
    if not isinstance(state, PerExample):
        raise ArgumentError(f"`gm` should come from `perexfx.transform`. Found {type(gm).__name__}.")
    return state


def planned(gm: nn.Module) -> tuple[PerExample, Plan, Inputs]:
    """The state of a transformed module, its last plan, and the kind of input that this is for.

    Raises:
        ArgumentError: It is not a transformed module, or there is no plan yet.
    """
    state = state_of(gm)
    if state.plan is None or state.kind is None:
        raise ArgumentError(
            "There is no plan yet: without example inputs it is made at the first batch. "
            "Call the module once, or pass `example_inputs` to `transform`."
        )
    return state, state.plan, state.kind
