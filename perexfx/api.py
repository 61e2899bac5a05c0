"""The front door: `transform` is the pipeline, top to bottom."""

from __future__ import annotations

import gc
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from perexfx.analysis import Analysis, analyze
from perexfx.capture import OF_GRAPH_MODULES, Captured, capture, twin_of
from perexfx.ir.errors import ArgumentError, PerexError, RefusedError
from perexfx.ir.inputs import GivenInputs, Inputs, arguments_of, batch_sizes, bind_inputs, by_name, named_leaves
from perexfx.ir.rule import Rule
from perexfx.ir.site import Site
from perexfx.ir.strategy import REWEIGHT, Strategy
from perexfx.layers import RULES, Fallback
from perexfx.machine import Measured, current
from perexfx.planning import (
    Alternatives,
    Plan,
    check_forced,
    fit,
    make_plan,
    operand_dtype,
    with_kernels,
    with_shared_inputs,
)
from perexfx.rehearsal import Rehearsed
from perexfx.rewrites import Interleaved, refuse_batch_tables
from perexfx.runtime import PerExample, Runtime, Settings, Transformed, check_settings, rewrite
from perexfx.sites import (
    confirm,
    faster_with_channels_last,
    fit_segments,
    match,
    refuse_batch_statistics,
    refuse_other_trainables,
    regions_of,
    rerun_cost,
    segments_of,
    with_formats,
)
from perexfx.strategies import STRATEGIES, Reweight


def transform(
    model: nn.Module,
    example_inputs: GivenInputs | None = None,
    *,
    clip_norm: float | None = 1.0,
    clipping: str | Callable[[Tensor], Tensor] = "flat",
    loss_reduction: str = "mean",
    strategy: str | Mapping[str, str] = "auto",
    memory_budget: int | None = None,
    batch_dim: int = 0,
    cost_model: str = "profile",
    rules: Sequence[Rule] = (),
    strategies: Sequence[Strategy] = (),
) -> Transformed:
    """A GraphModule whose ordinary `loss.backward()` fills `.grad` with clipped per-example gradients.

    It holds the model's own Parameter objects under the same names and takes the model's arguments, so that a training
    loop and an optimizer built on the model work unchanged. `gm.perexfx` has `norms`, `clip_factors`, `plan` and
    `sites`. After `backward()` every trainable parameter's `.grad` has grown by `sum_i c_i g_i`
    (`loss_reduction="sum"`) or `1/B sum_i c_i g_i` (`"mean"`), where `g_i` is the gradient of example i's own loss over
    all trainable parameters together.

    torch.fx patches torch.nn.Module while it traces: no other thread should run modules during a transform.

    Args:
        model: Any module that torch.fx can trace.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs. With them the plan is made
            at once, from their shapes alone; without, at the first batch. Other batch sizes may follow.
        clip_norm: C > 0, the largest gradient norm of an example; None: measure the norms, clip nothing.
        clipping: "flat": `c_i = min(1, C / ||g_i||)`. "automatic": `c_i = C / (||g_i|| + 0.01)`. "per_layer": every
            group of sites that share parameters is clipped on its own, to `C / sqrt(number of groups)`. Or a function
            from norms `[B]` to factors `[B]`.
        loss_reduction: How the loss joins the examples: "mean" or "sum". It must be what the loss does.
        strategy: "auto", one strategy's name for every site it applies to, or {site name: strategy name}. "reweight"
            has the part of the graph around a site run a second time, for the memory that this saves.
        memory_budget: Bytes by which the rewrite may raise the peak memory of a step, by prediction; None: no bound.
        batch_dim: The example axis of the inputs.
        cost_model: What "auto" goes by. "profile": predictions, by this machine's profile where `perexfx calibrate` has
            made one, else by the built-in one. "measured": the candidates are timed on the real sizes, once for this
            machine; the first plan takes seconds longer.
        rules: Layer rules of your own (`perexfx.Rule`), tried before the built-in ones.
        strategies: Strategies of your own (`perexfx.Strategy`), which the planner chooses from beside the built-in
            ones; they win ties.

    Returns:
        The transformed module.

    Raises:
        ArgumentError: An argument is not what it should be.
        CaptureError: The model cannot be traced.
        MixingError: The model combines different examples.
        CoverageError: A use of a trainable parameter is not covered by any layer rule.
        StrategyError: A strategy asked for does not exist or does not apply.
        BudgetError: No plan fits the memory budget.
    """
    settings = Settings(clip_norm, clipping, loss_reduction, strategy, memory_budget, batch_dim, cost_model)
    _check_arguments(model, settings)
    rules, strategies = _several("rules", rules), _several("strategies", strategies)
    _check_strategies(strategies)
    inputs = None if example_inputs is None else by_name(bind_inputs(model, example_inputs, "example_inputs"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]

    with _collector_paused():
        captured, twin, known = _understand(model, inputs, batch_dim)
    analysis = None if known is None else known.analysis
    with _drawn(captured.graph, twin):
        sites = match(captured.graph, twin, trainable, (*rules, *RULES), Fallback(), batch_dim, analysis)
    _check_reached(sites, trainable)
    with _drawn(captured.graph, twin):
        check_forced(sites, (*strategies, *STRATEGIES), strategy)
    regions = regions_of(captured.graph, twin, sites)
    segments = segments_of(captured.graph, sites)
    planner = partial(_plan_for, tuple(rules), tuple(strategies))
    runtime = Runtime(sites, regions, segments, settings, captured, trainable, frozen, planner)
    transformed = rewrite(twin, captured.graph, runtime)
    if known is not None:
        runtime.remember(known.kind, known.analysis)
        runtime.prepare(known.kind, known.n)
    return transformed


@dataclass(frozen=True)
class _Known:
    """What example inputs tell: their kind, their batch size, and where every value carries examples."""

    kind: Inputs
    n: int
    analysis: Analysis


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without garbage collections: capture and analysis make many objects that live to their end."""
    collects = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def _drawn(graph: fx.Graph, module: nn.Module) -> Iterator[None]:
    """A refusal inside has the graph with it."""
    try:
        yield
    except RefusedError as error:
        error.graph, error.module = graph, module
        raise


def _understand(
    model: nn.Module, inputs: Mapping[str, Any] | None, batch_dim: int
) -> tuple[Captured, nn.Module, _Known | None]:
    """The captured graph, the module that it runs on, and what the inputs tell.

    Where the inputs have different sizes on the example axis, the batch is what reaches that axis of the output.
    """
    sizes = [None] if inputs is None else batch_sizes(named_leaves(inputs), batch_dim) or [None]
    found: list[tuple[Captured, nn.Module, _Known | None]] = []
    refused: list[PerexError] = []
    for examples in sizes:
        try:
            captured = capture(model, inputs, batch_dim, examples)
            twin = twin_of(model, captured.constants)
            with _drawn(captured.graph, twin):
                refuse_batch_statistics(captured.graph, twin)
                refuse_other_trainables(captured.graph, twin)
                known = None if inputs is None else _analyze_for(captured, twin, inputs, batch_dim, examples)
        except PerexError as error:
            refused.append(error)
            continue
        found.append((captured, twin, known))
        if known is None or known.analysis.example_axis_of_output() == batch_dim:
            return found[-1]
    if not found:
        raise refused[0]
    return found[0]


def _analyze_for(
    captured: Captured, twin: nn.Module, inputs: Mapping[str, Any], batch_dim: int, examples: int | None
) -> _Known:
    leaves = named_leaves(arguments_of(captured.graph, inputs))
    kind, n = Inputs.of(leaves, batch_dim, examples=examples)
    return _Known(kind, n, analyze(captured.graph, twin, kind, batch_dim))


def _plan_for(
    rules: tuple[Rule, ...], strategies: tuple[Strategy, ...], runtime: Runtime, module: nn.Module, kind: Inputs, n: int
) -> Plan:
    """The plan for one kind of input and batch size; analyzed once per kind, planned once per batch size."""
    settings, graph = runtime.settings, runtime.captured.graph
    analysis = runtime.known(kind)
    if analysis is None:
        with _drawn(graph, module):
            analysis = analyze(graph, module, kind, settings.batch_dim)
            found = match(graph, module, runtime.trainable, (*rules, *RULES), Fallback(), settings.batch_dim, analysis)
            confirm(runtime.sites.sites, found)
        runtime.remember(kind, analysis)
    fitted = fit(runtime.sites.sites, graph, analysis, n, Fallback)
    dtype = operand_dtype(runtime.sites.sites, graph, analysis)
    device = next(iter(module.parameters())).device
    fitted = with_shared_inputs(with_kernels(fitted, dtype, device), runtime.sites.sites, graph)
    machine = current() if settings.cost_model == "profile" else Measured.on_this_machine(dtype, device)
    alternatives = Alternatives((*strategies, *STRATEGIES), Reweight, machine, dtype.itemsize)
    channels_last = faster_with_channels_last(
        runtime.regions, graph, module, analysis, fitted, alternatives.least_seconds, machine
    )
    fitted = with_formats(fitted, runtime.regions, channels_last)
    segments = fit_segments(
        runtime.segments,
        graph,
        module,
        analysis,
        lambda segment: rerun_cost(segment, graph, analysis, fitted, n, dtype.itemsize),
    )
    with _drawn(graph, module):
        plan = make_plan(
            runtime.sites.sites,
            fitted,
            alternatives,
            forced=settings.strategy,
            channels_last=channels_last,
            segments=segments,
            footprint=Rehearsed(runtime, kind),
        )
    return plan if settings.memory_budget is None else plan.within(settings.memory_budget)


T = TypeVar("T")
_RESERVED = (set(dir(fx.GraphModule)) - set(dir(nn.Module))) | {"perexfx", "_graph", "_code", "meta"}


def _names(model: nn.Module) -> list[str]:
    """Paths of everything that is registered in a module."""
    modules = [name for name, _ in model.named_modules() if name]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [*modules, *(name for name, _ in tensors)]


def _cannot_be_written(name: str) -> bool:
    """Whether torch.fx writes code that is not valid for an attribute of this name."""
    return keyword.iskeyword(name) or not name.isprintable() or '"' in name or "\\" in name


def _check_arguments(model: nn.Module, settings: Settings) -> None:
    """Raises: ArgumentError, naming the first argument that is not what it should be."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("`model` is a scripted module, whose code cannot be traced. Transform the original model.")
    _check_parts(model)
    if lazy := [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]:
        raise ArgumentError(
            f"Parameter `{lazy[0]}` has no shape yet. Call the model once, which gives lazy modules their shapes, "
            "before the transform."
        )
    of_graph = OF_GRAPH_MODULES if isinstance(model, fx.GraphModule) else ()
    own = {*model._parameters, *model._buffers, *model._modules, *vars(model)}.difference(of_graph)
    taken = sorted(_RESERVED.intersection(own))
    if taken:
        raise ArgumentError(
            f"`{type(model).__name__}` has an attribute `{taken[0]}`, a name that GraphModules need for themselves. "
            "Rename it."
        )
    if unwritable := [name for name in _names(model) if _cannot_be_written(name.rpartition(".")[2])]:
        raise ArgumentError(
            f"The name {unwritable[0]!r} cannot stand in the code of a graph: its last part is a keyword of Python, or "
            "has quotes, backslashes or line breaks. Rename it."
        )
    check_settings(settings)


def _check_parts(model: nn.Module) -> None:
    """Raises: ArgumentError, where the model has a module that is to be transformed otherwise."""
    if any(isinstance(module, Interleaved) for module in model.modules()):
        raise ArgumentError(
            "`model` takes full and reduced batches in turn. Transform both and interleave what comes out: "
            "`perexfx.interleave(perexfx.transform(full, x), perexfx.transform(reduced, x), schedule)`."
        )
    if any(isinstance(module, PerExample) for module in model.modules()):
        raise ArgumentError("`model` was transformed already. Transform the original model instead.")
    refuse_batch_tables(model)


def _several(name: str, given: Iterable[T]) -> tuple[T, ...]:
    """What was given as a sequence. Raises: ArgumentError, where it is none."""
    if not isinstance(given, Iterable):
        raise ArgumentError(f"`{name}` should be a sequence. Found {given!r}.")
    return tuple(given)


def _check_strategies(strategies: Sequence[Strategy]) -> None:
    """Raises: ArgumentError, naming the first that is no strategy, or has the name of another."""
    taken = {"auto", REWEIGHT, *(strategy.name for strategy in STRATEGIES)}
    for strategy in strategies:
        name = getattr(strategy, "name", None)
        missing = [part for part in ("refuses", "cost", "squared_norms") if not callable(getattr(strategy, part, None))]
        if not isinstance(name, str) or not name or missing or isinstance(strategy, type):
            raise ArgumentError(
                "`strategies` should hold instances with a `name`, and with `refuses`, `cost` and `squared_norms` as "
                f"`perexfx.Strategy` has them. Found {strategy!r}."
            )
        if type(strategy).__hash__ is None:
            raise ArgumentError(
                f"Strategy {name!r} cannot be hashed, and plans look strategies up. Give its class "
                "`@dataclass(frozen=True)`, or no `__eq__`."
            )
        if name in taken:
            raise ArgumentError(
                f"There are two strategies with the name {name!r}, by which `strategy` and reports know them. Rename "
                "yours."
            )
        taken.add(name)


def _check_reached(sites: Sequence[Site], trainable: Sequence[str]) -> None:
    if not sites:
        raise ArgumentError(
            "No trainable parameter meets the inputs, so there is nothing to clip. "
            + (f"Trainable are {', '.join(trainable)}." if trainable else "All parameters are frozen.")
        )
