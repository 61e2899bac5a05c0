"""Run time: what the nodes of a rewritten graph do.

Promises: one ordinary backward fills `.grad` with clipped sums. Every site leaves its factors on the tape, its norm
node turns them into squared norms (the gradient of a zero token of shape [B]), autograd adds the tokens up, and the
clip node, which runs last, turns the total into factors and returns each parameter's clipped sum as its gradient. No
state outlives a backward but `norms` and `clip_factors`.
"""

from __future__ import annotations

import logging
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from perexfx.analyze import Analysis
from perexfx.capture import Captured
from perexfx.inputs import Inputs
from perexfx.ir.errors import ArgumentError, ModeError, ShapeError
from perexfx.ir.factors import Factors, Gradient, squared_norms_of
from perexfx.ir.rule import Backward, Geometry
from perexfx.ir.site import Expression, Operand, Site, are_joined
from perexfx.plan import Plan

_logger = logging.getLogger("perexfx")

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


Planner = Callable[["PerExample", nn.Module, Inputs, int], Plan]


class PerExample(nn.Module):
    """What `transform` adds to a model: `gm.perexfx`.

    Attributes:
        sites: Every use of a trainable parameter, in graph order.
        settings: What `transform` was asked for.
        plan: The plan of the last forward, or the one made ahead of time; None before there is one.
        norms: Gradient norm of each example of the last backward, before clipping. Shape `[B]`.
        keep_gradients: Keep each example's gradients too, B times the memory of the parameters.
        gradients: Then, after a backward: parameter name -> gradient of each example's own loss, `[B, *shape]`.
        clip_factors: What each example's gradient was multiplied with. Shape `[B]`; with `clipping="per_layer"`
            `[groups, B]`, a row per group of sites that share parameters, in graph order.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        settings: Settings,
        captured: Captured,
        trainable: Sequence[str],
        planner: Planner,
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.settings = settings
        self.captured = captured
        self.trainable = tuple(trainable)
        self._known_trainable = frozenset(trainable)
        self.plan: Plan | None = None
        self.norms: Tensor | None = None
        self.clip_factors: Tensor | None = None
        self.keep_gradients = False
        self.gradients: dict[str, Tensor] | None = None
        self._planner = planner
        self._analyses: dict[Inputs, Analysis] = {}
        self._plans: dict[tuple[Inputs, int], Plan] = {}
        self._by_name = {site.name: site for site in self.sites}
        self._owner: weakref.ref[nn.Module] | None = None
        self._carriers: tuple[bool, ...] | None = None
        self._backward_seen = -1

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the link to the module, which that restores, and what is known of past inputs."""
        return {**self.__dict__, "_owner": None, "_analyses": {}, "_plans": {}}

    def extra_repr(self) -> str:
        """A line for `print(gm)`."""
        return f"{len(self.sites)} sites, clip_norm={self.settings.clip_norm}, clipping={self.settings.clipping!r}"

    def belongs_to(self, module: nn.Module) -> None:
        """Links to the transformed module, whose parameters the analysis reads."""
        self._owner = weakref.ref(module)

    def site(self, name: str) -> Site:
        """A site by name."""
        return self._by_name[name]

    @property
    def owner(self) -> nn.Module:
        """The transformed module."""
        owner = self._owner() if self._owner is not None else None
        if owner is None:
            raise ModeError("`gm.perexfx` was taken out of its module, or the module no longer exists.")
        return owner

    def forward(self, names: tuple[str, ...], *values: Any) -> Tape:
        """The tape of one forward: checks that the graph is right for this call, and looks up or makes the plan."""
        arguments = dict(zip(names, values, strict=True))
        self._check_baked(arguments)
        self._check_modes()
        if not torch.is_grad_enabled():
            return Tape(self, None, 0)
        self._check_trainable()
        kind, n = Inputs.of(arguments, self.settings.batch_dim, self._carriers)
        self.plan = self._plans.get((kind, n)) or self.prepare(kind, n)
        return Tape(self, self.plan, n)

    def prepare(self, kind: Inputs, n: int) -> Plan:
        """Makes the plan for one kind of input and batch size, and remembers it."""
        self.plan = self._plans[kind, n] = self._planner(self, self.owner, kind, n)
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
        for name, parameter in self.owner.named_parameters():
            if parameter.requires_grad and name not in self._known_trainable:
                raise ModeError(
                    f"Parameter `{name}` was frozen when the model was transformed and is trainable now: its gradient "
                    "would not be clipped. Transform the model again, or freeze it."
                )


class Tape:
    """What one forward shares with its backward: the plan, and what sites leave behind for the clip node."""

    def __init__(self, state: PerExample, plan: Plan | None, n: int) -> None:
        self.state, self.plan, self.n = state, plan, n
        self.active: frozenset[str] = frozenset()
        self.parameters: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.constants: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._task: int | None = None
        self.observed: dict[tuple[str, str], Factors] = {}
        self.held: dict[tuple[str, str], Factors] = {}
        self.squared_norms: dict[str, Tensor] = {}

    def enter_backward(self) -> None:
        """Forgets what an earlier backward of this forward left behind: it may have stopped before the clip node."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self.release()

    def release(self) -> None:
        """Lets go of everything that a backward left behind."""
        self.observed, self.held, self.squared_norms = {}, {}, {}

    @property
    def scale(self) -> int:
        """What brings the gradients that arrive to those of each example's own loss."""
        return self.n if self.state.settings.loss_reduction == "mean" else 1


class _Clip(Function):
    """The clip node: hands out parameters and a zero token, and returns clipped sums as the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, names: tuple[str, ...], *parameters: Tensor) -> Any:
        ctx.tape, ctx.names = tape, names
        ctx.set_materialize_grads(False)
        tape.active = frozenset(name for name, p in zip(names, parameters, strict=True) if p.requires_grad)
        dtype = torch.float32
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        device = parameters[0].device
        token = torch.zeros(tape.n, dtype=dtype, device=device)
        given = tuple(parameter.detach() for parameter in parameters)
        tape.parameters = dict(zip(names, given, strict=True))
        tape.versions = {name: parameter._version for name, parameter in tape.parameters.items()}
        ctx.mark_non_differentiable(*given)
        return (token, *given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        total: Tensor | None = grad_outputs[0]
        tape: Tape = ctx.tape
        if total is None:
            return (None,) * (2 + len(ctx.names))
        tape.state.claim_backward()
        gradients = _clipped_sums(tape, total)
        tape.release()
        return (None, None, *(gradients.get(name) for name in ctx.names))


def clip(tape: Tape, names: tuple[str, ...], *parameters: Tensor) -> tuple[Tensor, ...]:
    """The token and the parameters, in order: `(zeros [B], *parameters)`."""
    if tape.plan is None:
        return (parameters[0].new_empty(0), *(parameter.detach() for parameter in parameters))
    return _Clip.apply(tape, names, *parameters)


class _Norm(Function):
    """A norm node: identity on the token; its gradient is the squared norms of one group of sites."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, token: Tensor, group: str) -> Tensor:
        ctx.tape, ctx.group = tape, group
        ctx.set_materialize_grads(False)
        return token.view_as(token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        return None, _squared_norms(ctx.tape, ctx.group), None


def norm(tape: Tape, token: Tensor, group: str) -> Tensor:
    """The token, for the sites of one group: where their squared norms join the total."""
    return token if tape.plan is None else _Norm.apply(tape, token, group)


class _PerExampleOp(Function):
    """A layer: its output forward; backward the gradient of its inputs, and its factors onto the tape."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        site: Site,
        _token: Tensor,
        arguments: dict[str, Any],
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        assert tape.plan is not None
        geometry = tape.plan.geometries[site.name]
        given = {**arguments, **dict(zip(names, tensors, strict=True))}
        output, residuals = site.rule.forward(given, geometry)
        _check_shape(site, output, geometry)
        if output._is_view():  # torch refuses to let later layers change a custom function's view in place
            output = torch.ops.aten._unsafe_view.default(output, output.shape)
        inputs = {name for name, needed in zip(names, ctx.needs_input_grad[5:], strict=True) if needed}
        operands = {operand.name for operand in site.operands if _is_active(tape, operand)}
        read = site.rule.reads(given, inputs, operands)
        ctx.saved_names = tuple(name for name in names if name in read)
        ctx.save_for_backward(*(given[name] for name in ctx.saved_names), *residuals)
        ctx.tape, ctx.site, ctx.arguments, ctx.names, ctx.geometry = tape, site, arguments, names, geometry
        ctx.inputs, ctx.operands = inputs, operands
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        tape, site, names = ctx.tape, ctx.site, ctx.names
        tape.enter_backward()
        saved, tensors = ctx.saved_names, ctx.saved_tensors
        call = Backward(
            arguments={**ctx.arguments, **dict(zip(saved, tensors, strict=False))},
            residuals=tensors[len(saved) :],
            grad_output=grad_outputs[0],
            geometry=ctx.geometry,
            inputs=ctx.inputs,
            operands=ctx.operands,
        )
        gradients, factors = site.rule.backward(call)
        for name, found in factors.items():
            tape.observed[site.name, name] = found
        return (None,) * 5 + tuple(gradients.get(name) for name in names)


def per_example(tape: Tape, token: Tensor, name: str, constants: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The output of a layer.

    Args:
        tape: Of this forward.
        token: From the norm node of the site's group.
        name: The site.
        constants: Per operand, what its parameter expression reads besides parameters.
        args: The layer's own arguments.
        kwargs: The layer's own keyword arguments.
    """
    site = tape.state.site(name)
    arguments = site.rule.bind(site.target, args, kwargs)
    if tape.plan is None or not any(_is_active(tape, operand) for operand in site.operands):
        return _call(site, args, kwargs)
    for operand, values in zip(site.operands, constants, strict=True):
        tape.constants[name, operand.name] = values
    names = tuple(key for key, value in arguments.items() if isinstance(value, Tensor))
    geometry = tape.plan.geometries[name]
    for key in names:
        if key in geometry.shapes and tuple(arguments[key].shape) != geometry.shapes[key]:
            _wrong_shape(site, key, arguments[key].shape, geometry.shapes[key])
    tensors = [arguments.pop(key) for key in names]
    return _PerExampleOp.apply(tape, site, token, arguments, names, *tensors)


def _call(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if isinstance(site.target, str):
        return getattr(args[0], site.target)(*args[1:], **kwargs)
    return site.target(*args, **kwargs)


def _is_active(tape: Tape, operand: Operand) -> bool:
    return any(name in tape.active for name in operand.expression.parameters)


def _check_shape(site: Site, output: Tensor, geometry: Geometry) -> None:
    if tuple(output.shape) != geometry.output_shape:
        _wrong_shape(site, "result", output.shape, geometry.output_shape)


def _wrong_shape(site: Site, what: str, found: Sequence[int], expected: Sequence[int]) -> None:
    raise ShapeError(
        f"At {site.place}, `{what}` should be of shape {list(expected)} by the analysis of the graph. "
        f"Found {list(found)}. A shape that does not follow the batch size linearly (`squeeze()` on a batch of 1, for "
        "example) has no plan. Name the axes to squeeze or reshape."
    )


def _squared_norms(tape: Tape, group: str) -> Tensor | None:
    """The squared norms of a group of sites, and onto the tape what its clipped sums are made of."""
    assert tape.plan is not None
    members = [site for site in tape.state.sites if site.group == group]
    uses = [
        (site, operand) for site in members for operand in site.operands if (site.name, operand.name) in tape.observed
    ]
    if not uses:
        return None
    if are_joined(members):
        total = _joined_squared_norms(tape, uses)
    else:
        parts = []
        for site, operand in uses:
            key = site.name, operand.name
            squared, held = tape.plan.strategies[key].squared_norms(tape.observed.pop(key))
            tape.held[key] = held
            parts.append(squared)
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    tape.squared_norms[group] = total
    return total


def _joined_squared_norms(tape: Tape, uses: Sequence[tuple[Site, Operand]]) -> Tensor:
    """Uses of the same parameters: their per-example gradients are pulled back to the parameters and added first."""
    sums: dict[str, Tensor] = {}
    for site, operand in uses:
        key = site.name, operand.name
        _add_pulled(tape, key, tape.observed.pop(key).gradients(), _pull_back_each, sums)
    for name, value in sums.items():
        tape.held["", name] = Gradient(value)
    return torch.stack([squared_norms_of(value) for value in sums.values()]).sum(0)


def _vjp(tape: Tape, key: tuple[str, str], expression: Expression) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """From the gradient of an expression's value to those of its parameters."""
    function, constants = expression.function, tape.constants[key]
    assert function is not None
    values = [tape.parameters[name] for name in expression.parameters]
    for name, value in zip(expression.parameters, values, strict=True):
        if value._version != tape.versions[name]:
            raise ModeError(
                f"Parameter `{name}` was changed between the forward and the backward, which needs its old value. "
                "Call `backward()` before `optimizer.step()`."
            )
    with torch.enable_grad():
        _, vjp, *_ = torch.func.vjp(lambda *given: function(*given, *constants), *values)
    return vjp


def _pull_back(tape: Tape, key: tuple[str, str], expression: Expression, gradient: Tensor) -> dict[str, Tensor]:
    """The gradient of an expression's parameters from that of its value."""
    if expression.function is None:
        return {expression.parameters[0]: gradient}
    return dict(zip(expression.parameters, _vjp(tape, key, expression)(gradient), strict=True))


def _pull_back_each(tape: Tape, key: tuple[str, str], expression: Expression, gradients: Tensor) -> dict[str, Tensor]:
    """The same for each example's gradient, `[n, *shape]`."""
    if expression.function is None:
        return {expression.parameters[0]: gradients}
    if gradients.shape[0] == 0:
        values = {name: tape.parameters[name] for name in expression.parameters}
        return {name: value.new_zeros(0, *value.shape) for name, value in values.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # slower, not wrong
        pulled = torch.func.vmap(_vjp(tape, key, expression))(gradients)
    return dict(zip(expression.parameters, pulled, strict=True))


def _clipped_sums(tape: Tape, total: Tensor) -> dict[str, Tensor]:
    """Factors from the total, then each parameter's weighted sum."""
    state = tape.state
    norms = total.sqrt() * tape.scale
    lost = ~torch.isfinite(norms)
    any_lost = bool(lost.any())
    if any_lost:
        _logger.warning(
            "%d of %d examples have gradients that are not finite; they count as zero.",
            int(lost.sum()),
            tape.n,
        )
    factors = _factors(tape, norms, lost)
    state.norms = norms
    rows = list(factors.values())
    state.clip_factors = torch.stack(rows) if state.settings.clipping == "per_layer" else rows[0]
    if state.keep_gradients:
        state.gradients = _per_example_gradients(tape)
    sums: dict[str, Tensor] = {}
    for key in list(tape.held):
        held = tape.held.pop(key)
        if any_lost:
            held = held.without(lost)
        site = state.site(key[0]) if key[0] else _first_use(state, key[1])
        _add_pulled(tape, key, held.weighted_sum(factors[site.group]), _pull_back, sums)
    return {name: value.to(tape.parameters[name].dtype) for name, value in sums.items()}


def _per_example_gradients(tape: Tape) -> dict[str, Tensor]:
    """Of each example's own loss, by parameter."""
    each: dict[str, Tensor] = {}
    for key, held in tape.held.items():
        _add_pulled(tape, key, held.gradients() * tape.scale, _pull_back_each, each)
    return each


def _add_pulled(
    tape: Tape,
    key: tuple[str, str],
    value: Tensor,
    pull_back: Callable[[Tape, tuple[str, str], Expression, Tensor], dict[str, Tensor]],
    sums: dict[str, Tensor],
) -> None:
    """Adds what a value contributes to each trained parameter."""
    pulled = {key[1]: value}
    if key[0]:
        operand = next(operand for operand in tape.state.site(key[0]).operands if operand.name == key[1])
        pulled = pull_back(tape, key, operand.expression, value)
    for name, part in pulled.items():
        if name in tape.active:
            sums[name] = sums[name] + part if name in sums else part


def _first_use(state: PerExample, parameter: str) -> Site:
    return next(site for site in state.sites if parameter in site.parameters)


def _factors(tape: Tape, norms: Tensor, lost: Tensor) -> dict[str, Tensor]:
    """Group -> factors `[B]`; zero for examples that are not finite."""
    settings = tape.state.settings
    groups = list(dict.fromkeys(site.group for site in tape.state.sites))
    if settings.clipping == "per_layer":
        share = None if settings.clip_norm is None else settings.clip_norm / math.sqrt(len(groups))
        zero = torch.zeros_like(norms)
        layer_norms = [tape.squared_norms.get(group, zero).sqrt() * tape.scale for group in groups]
        each = [_flat(layer_norm, share) for layer_norm in layer_norms]
    elif callable(settings.clipping):
        each = [_checked(settings.clipping(norms), norms)] * len(groups)
    elif settings.clipping == "automatic":
        each = [_automatic(norms, settings.clip_norm)] * len(groups)
    else:
        each = [_flat(norms, settings.clip_norm)] * len(groups)
    each = [factor.to(norms.dtype).masked_fill(lost, 0) for factor in each]
    return dict(zip(groups, each, strict=True))


def _flat(norms: Tensor, clip_norm: float | None) -> Tensor:
    """`min(1, C / norm)`: Abadi et al. 2016, arXiv:1607.00133."""
    return torch.ones_like(norms) if clip_norm is None else (clip_norm / norms).clamp(max=1)


AUTOMATIC_STABILITY = 0.01
"""gamma of automatic clipping (AUTO-S)."""


def _automatic(norms: Tensor, clip_norm: float | None) -> Tensor:
    """`C / (norm + gamma)`: AUTO-S of Bu et al. 2022, arXiv:2206.07136."""
    return torch.ones_like(norms) if clip_norm is None else clip_norm / (norms + AUTOMATIC_STABILITY)


def _checked(factors: Any, norms: Tensor) -> Tensor:
    if not isinstance(factors, Tensor) or factors.shape != norms.shape:
        found = list(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ArgumentError(
            f"`clipping` must return one factor per example, shape {list(norms.shape)}. Found {found}. "
            "It is called with the norms of the examples."
        )
    return factors.detach()


__all__ = ["PerExample", "Settings", "Tape", "clip", "norm", "per_example"]
