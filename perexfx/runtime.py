"""Run time: what the nodes of a rewritten graph do.

Promises: one ordinary backward fills `.grad` with clipped sums. Every site leaves its factors on the tape, its norm
node turns them into squared norms (the gradient of a zero token of shape [B]), autograd adds the tokens up, and the
clip node, which runs last, turns the total into factors and returns each parameter's clipped sum as its gradient. No
state outlives a backward but `norms` and `clip_factors`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from perexfx.clipping import clip_factors_of
from perexfx.ir.errors import ShapeError
from perexfx.ir.factors import Gradient, squared_norms_of
from perexfx.ir.rule import Backward, Shape
from perexfx.ir.site import Operand, Site
from perexfx.ir.tracing import is_watched
from perexfx.pull_back import add_pulled, pull_back, pull_back_each
from perexfx.state import PerExample
from perexfx.tape import Tape

_logger = logging.getLogger("perexfx")


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


class _Structure:
    """How the tensors that a site returns make up its result."""

    def __init__(self) -> None:
        self.spec: pytree.TreeSpec | None = None
        self.leaves: list[Any] = []

    def flatten(self, output: Any) -> tuple[Tensor, ...]:
        """The tensors of a result; all else is remembered."""
        self.leaves, self.spec = pytree.tree_flatten(output)
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The result around its tensors."""
        assert self.spec is not None
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.leaves = []
        return pytree.tree_unflatten(leaves, self.spec)


class _PerExampleOp(Function):
    """A layer: its output forward; backward the gradient of its inputs, and its factors onto the tape."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        site: Site,
        _token: Tensor,
        arguments: dict[str, Any],
        structure: _Structure,
        names: tuple[str, ...],
        *tensors: Tensor,
    ) -> Any:
        assert tape.plan is not None
        rule, geometry = tape.plan.fitted[site.name].rule, tape.plan.fitted[site.name].geometry
        given = {**arguments, **dict(zip(names, tensors, strict=True))}
        output, residuals = rule.forward(given, geometry)
        outputs = structure.flatten(output)
        for value, expected in zip(outputs, geometry.outputs, strict=True):
            _check_shape(site, "result", value, expected.shape)
        # torch refuses to let later layers change a custom function's view in place
        outputs = tuple(torch.ops.aten._unsafe_view.default(v, v.shape) if v._is_view() else v for v in outputs)
        ctx.mark_non_differentiable(*(value for value in outputs if not value.is_floating_point()))
        inputs = {name for name, needed in zip(names, ctx.needs_input_grad[6:], strict=True) if needed}
        operands = {operand.name for operand in site.operands if _is_active(tape, operand)}
        read = rule.reads(given, inputs, operands)
        ctx.saved_names = tuple(name for name in names if name in read)
        ctx.save_for_backward(*(given[name] for name in ctx.saved_names), *residuals)
        ctx.tape, ctx.site, ctx.arguments, ctx.names = tape, site, arguments, names
        ctx.rule, ctx.geometry = rule, geometry
        ctx.inputs, ctx.operands = inputs, operands
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        tape, site, names = ctx.tape, ctx.site, ctx.names
        tape.enter_backward()
        saved, tensors = ctx.saved_names, ctx.saved_tensors
        call = Backward(
            arguments={**ctx.arguments, **dict(zip(saved, tensors, strict=False))},
            residuals=tensors[len(saved) :],
            grad_outputs=grad_outputs,
            geometry=ctx.geometry,
            inputs=ctx.inputs,
            operands=ctx.operands,
        )
        gradients, factors = ctx.rule.backward(call)
        for name, found in factors.items():
            tape.observed[site.name, name] = found
        return (None,) * 6 + tuple(gradients.get(name) for name in names)


def per_example(tape: Tape, token: Tensor, name: str, constants: Any, *args: Any, **kwargs: Any) -> Any:
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
    geometry = tape.plan.fitted[name].geometry
    for key in names:
        if key in geometry.shapes:
            _check_shape(site, key, arguments[key], geometry.shapes[key])
    tensors = [arguments.pop(key) for key in names]
    structure = _Structure()
    return structure.rebuild(_PerExampleOp.apply(tape, site, token, arguments, structure, names, *tensors))


def _call(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(site.target, str):
        return getattr(args[0], site.target)(*args[1:], **kwargs)
    return site.target(*args, **kwargs)


def _is_active(tape: Tape, operand: Operand) -> bool:
    return any(name in tape.active for name in operand.expression.parameters)


def _check_shape(site: Site, what: str, value: Tensor, expected: Shape) -> None:
    if tuple(value.shape) == expected:
        return
    raise ShapeError(
        f"At {site.place}, `{what}` should be of shape {list(expected)} by the analysis of the graph. "
        f"Found {list(value.shape)}. A shape that does not follow the batch size linearly "
        "(`squeeze()` on a batch of 1, for example) has no plan. Name the axes to squeeze or reshape."
    )


def _squared_norms(tape: Tape, group: str) -> Tensor | None:
    """The squared norms of a group of sites, and onto the tape what its clipped sums are made of."""
    assert tape.plan is not None
    uses = [
        (site, operand)
        for site in tape.state.groups[group]
        for operand in site.operands
        if (site.name, operand.name) in tape.observed
    ]
    if not uses:
        return None
    if group in tape.state.joined:
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
        add_pulled(tape, key, tape.observed.pop(key).gradients(), pull_back_each, sums)
    for name, value in sums.items():
        tape.held["", name] = Gradient(value)
    return torch.stack([squared_norms_of(value) for value in sums.values()]).sum(0)


def _clipped_sums(tape: Tape, total: Tensor) -> dict[str, Tensor]:
    """Factors from the total, then each parameter's weighted sum."""
    state = tape.state
    norms = total.sqrt() * tape.scale
    lost = ~torch.isfinite(norms)
    is_traced = is_watched()  # a graph has no branches: it selects in any case
    drops = is_traced or bool(lost.any())
    if drops and not is_traced:
        _logger.warning(
            "%d of %d examples have gradients that are not finite; they count as zero.",
            int(lost.sum()),
            tape.n,
        )
    factors = clip_factors_of(tape, norms, lost)
    state.norms = norms
    rows = list(factors.values())
    state.clip_factors = torch.stack(rows) if state.settings.clipping == "per_layer" else rows[0]
    if state.keep_gradients:
        state.gradients = _per_example_gradients(tape)
    sums: dict[str, Tensor] = {}
    for key in list(tape.held):
        held = tape.held.pop(key)
        if drops:
            held = held.without(lost)
        site = state.site(key[0]) if key[0] else _first_use(state, key[1])
        add_pulled(tape, key, held.weighted_sum(factors[site.group]), pull_back, sums)
    return {name: value.to(tape.parameters[name].dtype) for name, value in sums.items()}


def _per_example_gradients(tape: Tape) -> dict[str, Tensor]:
    """Of each example's own loss, by parameter."""
    each: dict[str, Tensor] = {}
    for key, held in tape.held.items():
        add_pulled(tape, key, held.gradients() * tape.scale, pull_back_each, each)
    return each


def _first_use(state: PerExample, parameter: str) -> Site:
    return next(site for site in state.sites if parameter in site.parameters)


__all__ = ["clip", "norm", "per_example"]
