"""Run time: what the nodes of a rewritten graph do.

Promises: one ordinary backward fills `.grad` with clipped sums. Every site leaves its factors on the tape, its norm
node turns them into squared norms (the gradient of a zero token of shape [B]), autograd adds the tokens up, and the
clip node, which runs last, turns the total into factors and returns each parameter's clipped sum as its gradient. A
site that shares nothing with others is its own norm node, and small gradients at hand wait for the clip node, which
takes them all at once. Nothing outlives a backward but its `Results`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ShapeError
from perexfx.ir.factors import Factors, Gradient
from perexfx.ir.norms import squared_norms_of
from perexfx.ir.rule import Backward, Fitted, Shape
from perexfx.ir.site import Key, Operand, Site
from perexfx.ir.weighed import squared_norms_by
from perexfx.kernels.watched import is_watched
from perexfx.runtime.clipped_sums import clipped_sums
from perexfx.runtime.pull_back import add_pulled, pull_back_each, weighed
from perexfx.runtime.small_gradients import may_wait
from perexfx.runtime.tape import ReceivingTape, Tape


class _Clip(Function):
    """The clip node: hands out parameters and a zero token, and returns clipped sums as the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, names: tuple[str, ...], *parameters: Tensor) -> Any:
        ctx.tape, ctx.names = tape, names
        ctx.set_materialize_grads(False)
        tape.activate(frozenset(name for name, p in zip(names, parameters, strict=True) if p.requires_grad))
        dtype = reduce(torch.promote_types, {parameter.dtype for parameter in parameters}, torch.float32)
        token = torch.zeros(tape.n, dtype=dtype, device=parameters[0].device)
        given = tuple([parameter.detach() for parameter in parameters])
        tape.parameters = dict(zip(names, given, strict=True))
        needed = names if tape.cuts else tape.sites.evaluated
        tape.versions = {name: tape.parameters[name]._version for name in needed}
        ctx.mark_non_differentiable(*given)
        return (token, *given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        total: Tensor | None = grad_outputs[0]
        tape: Tape = ctx.tape
        if total is None and not tape.waiting:
            return (None,) * (2 + len(ctx.names))
        tape.last.claim()
        gradients = clipped_sums(tape, total)
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
    """The token, for the sites of one group: where their squared norms join the total.

    A site alone in its group joins them itself.
    """
    return token if tape.plan is None or tape.sites.is_alone(group) else _Norm.apply(tape, token, group)


class _Structure:
    """How the tensors that a site returns make up its result."""

    def __init__(self) -> None:
        self.spec: pytree.TreeSpec | None = None
        self.leaves: list[Any] = []

    def flatten(self, output: Any) -> tuple[Tensor, ...]:
        """The tensors of a result; all else is remembered."""
        if isinstance(output, Tensor):
            return (output,)
        self.leaves, self.spec = pytree.tree_flatten(output)
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The result around its tensors."""
        if self.spec is None:
            return tensors[0]
        left = iter(tensors)
        leaves = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        self.leaves = []
        return pytree.tree_unflatten(leaves, self.spec)


class _Call:
    """One call of a site.

    Attributes:
        tape: Of this forward.
        site: The site.
        fitted: The rule for these shapes, and the shapes.
        arguments: Those that are no tensors, by name.
        names: Of the tensors.
        structure: Of the result.
    """

    __slots__ = ("arguments", "fitted", "names", "site", "structure", "tape")

    def __init__(
        self, tape: Tape, site: Site, fitted: Fitted, arguments: dict[str, Any], names: tuple[str, ...]
    ) -> None:
        self.tape, self.site, self.fitted, self.arguments, self.names = tape, site, fitted, arguments, names
        self.structure = _Structure()


class _PerExampleOp(Function):
    """A layer: its output forward; backward the gradient of its inputs, and its factors onto the tape."""

    @staticmethod
    def forward(ctx: Any, call: _Call, _token: Tensor, *tensors: Tensor) -> Any:
        site, names, rule, geometry = call.site, call.names, call.fitted.rule, call.fitted.geometry
        given = {**call.arguments, **dict(zip(names, tensors, strict=True))}
        output, residuals = rule.forward(given, geometry)
        outputs = call.structure.flatten(output)
        for value, expected in zip(outputs, geometry.outputs, strict=True):
            _check_shape(site, "result", value, expected.shape)
        # torch refuses to let later layers change a custom function's view in place
        outputs = tuple([torch.ops.aten._unsafe_view.default(v, v.shape) if v._is_view() else v for v in outputs])
        ctx.mark_non_differentiable(*[value for value in outputs if not value.is_floating_point()])
        inputs = {name for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True) if needed}
        operands = call.tape.operands[site.name]
        read = rule.reads(given, inputs, operands)
        ctx.saved_names = [name for name in names if name in read]
        ctx.save_for_backward(*[given[name] for name in ctx.saved_names], *residuals)
        ctx.call, ctx.inputs, ctx.operands = call, inputs, operands
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        call: _Call = ctx.call
        tape, site = call.tape, call.site
        tape.enter_backward()
        # with their history, what stays on the tape would keep the graph alive that keeps the tape
        saved = ctx.saved_names
        tensors: tuple[Any, ...] = tuple([_without_history(value) for value in ctx.saved_tensors])
        given = Backward(
            arguments={**call.arguments, **dict(zip(saved, tensors, strict=False))},
            residuals=tensors[len(saved) :],
            grad_outputs=grad_outputs,
            geometry=call.fitted.geometry,
            inputs=ctx.inputs,
            operands=ctx.operands,
        )
        gradients, factors = call.fitted.rule.backward(given)
        if isinstance(tape, ReceivingTape):
            tape.add(site.name, factors)
            return (None, None, *[gradients.get(name) for name in call.names])
        assert tape.plan is not None
        shared = {} if tape.options.one_by_one or is_watched() else tape.plan.left_users
        for name, found in factors.items():
            key = site.name, name
            tape.observed[key] = tape.with_shared_left(found, shared[key]) if key in shared else found
        squared = _squared_norms(tape, site.group) if tape.sites.is_alone(site.group) else None
        return (None, squared, *[gradients.get(name) for name in call.names])


def _without_history(value: Tensor | None) -> Tensor | None:
    return value.detach() if value is not None and value.requires_grad else value


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
    site = tape.sites.site(name)
    arguments = site.rule.bind(site.target, args, kwargs)
    if tape.plan is None or not tape.is_trained(name):
        return _call(site, args, kwargs)
    for operand, values in zip(site.operands, constants, strict=True):
        if values:
            tape.constants[name, operand.name] = values
    names = tuple([key for key, value in arguments.items() if isinstance(value, Tensor)])
    fitted = tape.plan.fitted[name]
    shapes = fitted.geometry.shapes
    for key in names:
        if key in shapes:
            _check_shape(site, key, arguments[key], shapes[key])
    tensors = [arguments.pop(key) for key in names]
    call = _Call(tape, site, fitted, arguments, names)
    return call.structure.rebuild(_PerExampleOp.apply(call, token, *tensors))


def _call(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(site.target, str):
        return getattr(args[0], site.target)(*args[1:], **kwargs)
    return site.target(*args, **kwargs)


def _check_shape(site: Site, what: str, value: Tensor, expected: Shape) -> None:
    if value.shape == expected:
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
        for site in tape.sites.groups[group]
        for operand in site.operands
        if (site.name, operand.name) in tape.observed
    ]
    if not uses:
        return None
    if tape.sites.is_joined(group, tape.active):
        total = _joined_squared_norms(tape, uses)
    else:
        total, is_waited = None, tape.takes_together and not is_watched()
        for site, operand in uses:
            key = site.name, operand.name
            factors = weighed(tape, key, operand.expression, tape.observed.pop(key))
            if is_waited and may_wait(factors):
                tape.waiting[key] = factors
                continue
            squared, held = _checked(squared_norms_by(tape.plan.strategies[key], factors), tape, key)
            if tape.cuts and key in tape.plan.reweighted:
                tape.reweighted.add(key)
            if key not in tape.reweighted or tape.options.gradients_to is not None:
                tape.held[key] = held
            total = squared if total is None else total + squared
    if total is not None:
        tape.squared_norms[group] = total
    return total


def _checked(found: tuple[Tensor, Factors], tape: Tape, key: Key) -> tuple[Tensor, Factors]:
    """What a strategy returns. Raises: ShapeError, where that is not one number per example, and what to hold."""
    if type(found) is tuple and len(found) == 2:
        squared = found[0]
        if isinstance(squared, Tensor) and squared.shape == (tape.n,) and squared.dtype in _NORM_DTYPES:
            return found
    assert tape.plan is not None
    first = found[0] if isinstance(found, tuple) and found else found
    shown = f"{first.dtype} {list(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
    raise ShapeError(
        f"Strategy {tape.plan.strategies[key].name!r} should return squared norms of shape [{tape.n}], in float32 at "
        f"least, and factors to hold, for operand `{key[1]}` of site `{key[0]}`. Found {shown}."
    )


_NORM_DTYPES = (torch.float32, torch.float64)


def _joined_squared_norms(tape: Tape, uses: Sequence[tuple[Site, Operand]]) -> Tensor:
    """Uses of the same parameters: their per-example gradients are pulled back to the parameters and added first."""
    sums: dict[str, Tensor] = {}
    for site, operand in uses:
        key = site.name, operand.name
        add_pulled(tape, key, tape.observed.pop(key).gradients(), pull_back_each, sums)
    for name, value in sums.items():
        tape.held["", name] = Gradient(value)
    return torch.stack([squared_norms_of(value) for value in sums.values()]).sum(0)


__all__ = ["clip", "norm", "per_example"]
