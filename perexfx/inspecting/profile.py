"""Measuring a transformed module's own steps: what each site's strategy takes, beside what was predicted.

Promises: `.grad`, buffers, random number generators and what `gm.perexfx` says of the last backward are left as they
are; hooks and a `clipping` function run, as they do in any step. Whole steps, ordinary and clipped, are timed in turn
and undisturbed; sites are timed in steps of their own.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from perexfx.analysis import leaves_of
from perexfx.ir.alternative import Alternative
from perexfx.ir.cost import Cost
from perexfx.ir.errors import ArgumentError
from perexfx.ir.factors import Factors, Signature
from perexfx.ir.inputs import GivenInputs, bind_inputs, by_name, named_leaves
from perexfx.ir.rule import Backward, Wrapped
from perexfx.ir.strategy import REWEIGHT, Strategy
from perexfx.planning import Plan, Rerun
from perexfx.runtime import Runtime, StepOptions, Transformed, random_state_kept, runtime_of, stepping
from perexfx.sites import SiteTable
from perexfx.steps import LossFunction, checked_loss
from perexfx.steps import call as forward_of


@dataclass(frozen=True)
class SiteTime:
    """What one site took.

    Attributes:
        name: Of the site.
        seconds: Of its strategies, from factors to norms and from held factors to clipped sums; median. Of a second
            backward an equal part for each that asks for it.
        bytes_held: The memory of what it held between the two; None where that is held for several sites together.
    """

    name: str
    seconds: float
    bytes_held: int | None


@dataclass(frozen=True)
class Profile:
    """What `perexfx.profile` has measured. `str(profile)` is a line; `perexfx.report(gm)` has the sites.

    Attributes:
        batch_size: The number of examples.
        steps: How many steps of each kind were timed.
        device: That they ran on.
        ordinary_seconds: An ordinary forward, loss and backward; median.
        clipped_seconds: The same by the transformed module; median.
        ratio: Clipped against ordinary; median of the ratios of neighbours.
        sites: In graph order.
    """

    batch_size: int
    steps: int
    device: str
    ordinary_seconds: float
    clipped_seconds: float
    ratio: float
    sites: tuple[SiteTime, ...]

    def __str__(self) -> str:
        median = "one step" if self.steps == 1 else f"medians of {self.steps} steps"
        return (
            f"ordinary step {self.ordinary_seconds * 1e3:.2f} ms, clipped {self.clipped_seconds * 1e3:.2f} ms, ratio "
            f"{self.ratio:.2f}, of that the sites {sum(site.seconds for site in self.sites) * 1e3:.3f} ms "
            f"(batch of {self.batch_size}, {median} on {self.device})"
        )


def profile(gm: Transformed, loss_fn: LossFunction, x: GivenInputs, y: Any, *, steps: int = 15) -> Profile:
    """Times ordinary and clipped steps, and every site of them. `perexfx.report(gm)` shows it from then on.

    Args:
        gm: From `perexfx.transform`.
        loss_fn: `(gm(x), y) -> scalar`.
        x: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        y: Targets, passed to `loss_fn`.
        steps: How many of each kind are timed, after three to warm up.

    Raises:
        ArgumentError: An argument is not what it should be.
        PerexError: As the forward of `gm`.
    """
    runtime = runtime_of(gm)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"`steps` should be a positive number. Found {steps!r}.")
    if not callable(loss_fn):
        raise ArgumentError(f"`loss_fn` should be a function of output and targets. Found {type(loss_fn).__name__}.")
    kind, n = runtime.kind_of(named_leaves(by_name(bind_inputs(gm, x, "x"))))
    plain = fx.GraphModule(gm, copy.deepcopy(runtime.captured.graph))
    device = next(iter(gm.parameters())).device
    clock = _Clock(device)
    planned = runtime.plans.get((kind, n))
    with _left_as_it_was(gm, runtime):
        plan = runtime.follow(kind, n, planned) if planned else runtime.prepare(kind, n)
        ordinary, clipped = _in_turn(
            [lambda: _step(gm, plain.forward, loss_fn, x, y), lambda: _step(gm, gm, loss_fn, x, y)], steps, clock
        )
        timed = StepOptions(
            {(kind, n): _timed(plan, runtime.sites, clock)}, one_by_one=True, around_rerun=clock.runs_again
        )
        step_by_site = stepping(gm, timed)
        for at in range(WARM_UP + steps):
            clock.held.clear()
            _step(gm, step_by_site, loss_fn, x, y)
            clock.next_step(is_counted=at >= WARM_UP)
    found = Profile(
        batch_size=n,
        steps=steps,
        device=str(device),
        ordinary_seconds=statistics.median(ordinary),
        clipped_seconds=statistics.median(clipped),
        ratio=statistics.median(c / o for o, c in zip(ordinary, clipped, strict=True)),
        sites=tuple(SiteTime(s.name, clock.seconds_at(s.name), clock.held.get(s.name)) for s in runtime.sites.sites),
    )
    runtime.notes.of(Profile)[kind, n] = found
    runtime.follow(kind, n, plan)
    return found


WARM_UP = 3
"""Steps that are not counted."""


def _step(gm: Transformed, module: Callable[..., Any], loss_fn: LossFunction, x: GivenInputs, y: Any) -> None:
    loss = checked_loss(loss_fn(forward_of(module, x), y))
    torch.autograd.grad(loss, [p for p in gm.parameters() if p.requires_grad], allow_unused=True)


def _in_turn(steps: list[Callable[[], None]], times: int, clock: _Clock) -> list[list[float]]:
    """Seconds of each, one after the other and again."""
    found: list[list[float]] = [[] for _ in steps]
    for at in range(WARM_UP + times):
        for step, seconds in zip(steps, found, strict=True):
            start = clock.now()
            step()
            if at >= WARM_UP:
                seconds.append(clock.now() - start)
    return found


@contextmanager
def _left_as_it_was(gm: Transformed, runtime: Runtime) -> Iterator[None]:
    devices = {parameter.device for parameter in gm.parameters()}
    before = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    with runtime.set_aside(), random_state_kept(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in gm.named_buffers():
                    buffer.copy_(before[name])


class _Clock:
    """Adds up the seconds of each site, step by step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[str, int] = {}
        self._step: dict[str, float] = {}
        self._steps: dict[str, list[float]] = {}

    def now(self) -> float:
        """Seconds, with all work of the device done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def runs(self, site: str) -> Iterator[None]:
        """What runs inside belongs to a site."""
        start = self.now()
        yield
        self._step[site] = self._step.get(site, 0.0) + self.now() - start

    @contextmanager
    def runs_again(self, rerun: Rerun) -> Iterator[None]:
        """What runs inside belongs to the sites of a second backward, each an equal part."""
        start = self.now()
        yield
        share = (self.now() - start) / len(rerun.keys)
        for site, _ in rerun.keys:
            self._step[site] = self._step.get(site, 0.0) + share

    def holds(self, site: str, count: int) -> None:
        """Notes how many bytes an operand of a site holds in this step."""
        self.held[site] = self.held.get(site, 0) + count

    def next_step(self, *, is_counted: bool) -> None:
        """Ends a step."""
        for site, seconds in self._step.items() if is_counted else ():
            self._steps.setdefault(site, []).append(seconds)
        self._step = {}

    def seconds_at(self, site: str) -> float:
        """Median over steps; none where a site had nothing to do."""
        return statistics.median(self._steps[site]) if site in self._steps else 0.0


@dataclass(frozen=True)
class _TimedStrategy:
    """A strategy that tells the clock what it takes."""

    strategy: Strategy
    site: str
    clock: _Clock = field(compare=False)

    @property
    def name(self) -> str:
        """The strategy's own."""
        return self.strategy.name

    def refuses(self, signature: Signature) -> str | None:
        """The strategy's own."""
        return self.strategy.refuses(signature)

    def cost(self, signature: Signature, itemsize: int) -> Cost:
        """The strategy's own."""
        return self.strategy.cost(signature, itemsize)

    def squared_norms(self, factors: Factors) -> tuple[Tensor, Factors]:
        """The strategy's own, timed."""
        with self.clock.runs(self.site):
            squared, held = self.strategy.squared_norms(factors)
        is_held = self.name != REWEIGHT
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in leaves_of(held) if is_held}
        self.clock.holds(self.site, sum(storages.values()))
        return squared, _TimedFactors(held, self.site, self.clock)


@dataclass(frozen=True)
class _TimedFactors:
    """Factors that tell the clock what it takes to use them."""

    factors: Factors
    site: str
    clock: _Clock = field(compare=False)

    @property
    def signature(self) -> Signature:
        """The factors' own."""
        return self.factors.signature

    def gradients(self) -> Tensor:
        """The factors' own, timed."""
        with self.clock.runs(self.site):
            return self.factors.gradients()

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """The factors' own, timed."""
        with self.clock.runs(self.site):
            return self.factors.weighted_sum(weights)

    def without(self, dropped: Tensor) -> Factors:
        """The same without some examples."""
        return replace(self, factors=self.factors.without(dropped))


@dataclass(frozen=True)
class _TimedRule(Wrapped):
    """The rule of a site whose gradients are formed whatever the strategy: its factors tell the clock."""

    site: str
    clock: _Clock = field(compare=False)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """The rule's own, with factors that are timed."""
        gradients, factors = super().backward(call)
        return gradients, {name: _TimedFactors(found, self.site, self.clock) for name, found in factors.items()}


def _timed(plan: Plan, sites: SiteTable, clock: _Clock) -> Plan:
    """The plan with every strategy timed."""
    joined = {site.name for group in sites.joined for site in sites.groups[group]}
    decisions = tuple(
        replace(d, chosen=Alternative(_TimedStrategy(d.chosen.strategy, d.site, clock), 0.0, d.chosen.cost))
        for d in plan.decisions
    )
    fitted = {
        name: replace(found, rule=_TimedRule(found.rule, name, clock)) if name in joined else found
        for name, found in plan.fitted.items()
    }
    return replace(plan, decisions=decisions, fitted=fitted)


__all__ = ["Profile", "SiteTime", "profile"]
