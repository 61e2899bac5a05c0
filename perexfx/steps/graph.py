"""The whole step as one static graph: forward, loss, backward, norms, factors and clipped sums.

Promises: the graph takes parameters, buffers, inputs and targets, and returns loss, norms and gradients; it equals an
eager step of the transformed module to rounding, for every batch of the shapes it was made from, and reads nothing
else. Neither the module nor any `.grad` is changed by making it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import stateless
from torch.utils import _pytree as pytree

from perexfx.analysis import without_numbers
from perexfx.capture import quiet
from perexfx.ir.errors import ArgumentError, CaptureError, PerexError
from perexfx.ir.inputs import GivenInputs, bind_inputs, by_name, named_leaves
from perexfx.runtime import Transformed, runtime_of

LossFunction = Callable[[Any, Any], Tensor]


def step_graph(gm: Transformed, loss_fn: LossFunction, x: GivenInputs, y: Any) -> fx.GraphModule:
    """A GraphModule of tensor operations: `(params, buffers, x, y) -> (loss, norms, grads)`.

    `params`, `buffers` and `grads` are dicts by name, as of `named_parameters()` and `named_buffers()`; `norms` has
    shape `[B]`. Gradients are clipped as `gm` clips; a parameter that the loss does not reach has None. Examples whose
    gradient is not finite count as zero.

    Args:
        gm: From `perexfx.transform`.
        loss_fn: `(gm(x), y) -> scalar`.
        x: A tensor, a tuple of positional inputs, or a dict of keyword inputs; the graph holds for their shapes, and
            for what is not a tensor in them.
        y: Targets, passed to `loss_fn`: a tensor, or any pytree of tensors.

    Raises:
        ArgumentError: `gm` is not transformed, or `x` does not fit its forward.
        CaptureError: The step cannot be one graph: the model or the loss reads the value of a tensor.
    """
    step = functional_step(gm, loss_fn)

    def without_factors(*given: Any) -> Any:
        loss, norms, _, gradients = step(*given)
        return loss, norms, gradients

    return traced(gm, without_factors, x, y)


Step = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any, Any], Any]
"""`(params, buffers, x, y)` to what a step finds."""


def functional_step(gm: Transformed, loss_fn: LossFunction) -> Step:
    """An eager step as a function: `(params, buffers, x, y) -> (loss, norms, factors, grads)`.

    Raises: ArgumentError, where `gm` is not transformed.
    """
    if not isinstance(gm, Transformed):
        raise ArgumentError(f"`gm` should come from `perexfx.transform`. Found {type(gm).__name__}.")

    def step(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Any, y: Any) -> Any:
        trainable = {name for name, parameter in gm.named_parameters() if parameter.requires_grad}
        leaves = {name: value.detach().requires_grad_(name in trainable) for name, value in params.items()}
        with stateless._reparametrize_module(gm, {**leaves, **buffers}), torch.enable_grad():
            loss = checked_loss(loss_fn(call(gm, x), y))
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        results = gm.perexfx
        return loss.detach(), results.norms, results.clip_factors, dict(zip(wanted, found, strict=True))

    return step


def checked_loss(loss: Any) -> Tensor:
    """A loss. Raises: ArgumentError, where it is none that a backward can begin with."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ArgumentError(f"`loss_fn` should return a scalar tensor. Found {found}.")
    if not loss.requires_grad:
        raise ArgumentError("`loss_fn` should return a loss that depends on a trainable parameter. Found a constant.")
    return loss


def traced(
    gm: Transformed,
    step: Step,
    x: GivenInputs,
    y: Any,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    *,
    keeps_stacks: bool = False,
) -> fx.GraphModule:
    """A functional step as a graph, for the shapes of `x` and `y`.

    Args:
        gm: From `perexfx.transform`.
        step: From `functional_step`, or made of it.
        x: As of `step_graph`.
        y: As of `step_graph`.
        decompositions: aten operation -> what stands for it in the graph.
        keeps_stacks: Note for each operation the lines of code that it comes from.

    Raises: as `step_graph`.
    """
    arguments = named_leaves(by_name(bind_inputs(gm, x, "x")))
    given = dict(gm.named_parameters()), dict(gm.named_buffers()), x, y
    runtime = runtime_of(gm)
    with runtime.set_aside(), quiet():
        runtime.prepare(*runtime.kind_of(arguments))
        try:
            trace = make_fx(
                _of_tensors(step, given),
                decompositions,
                tracing_mode="fake",
                _allow_non_fake_inputs=True,  # losses close over class weights
                record_stack_traces=keeps_stacks,
            )
            return trace(*given)
        except PerexError:
            raise
        except Exception as error:  # a loss may fail in any way
            raise CaptureError(f"The step cannot be one graph. {without_numbers(error, 'the loss')}") from error


def call(gm: Callable[..., Any], x: Any) -> Any:
    """The module, or its forward, on a tensor, a tuple of positional inputs, or a dict of keyword inputs."""
    if isinstance(x, Mapping):
        return gm(**x)
    return gm(*x) if isinstance(x, tuple) else gm(x)


def _of_tensors(step: Callable[..., Any], given: Any) -> Callable[..., Any]:
    """The step with what is not a tensor as it was given: a graph has tensors alone for inputs."""
    fixed = pytree.tree_leaves(given)

    def of_tensors(*arguments: Any) -> Any:
        leaves, spec = pytree.tree_flatten(arguments)
        kept = [leaf if isinstance(leaf, Tensor) else value for leaf, value in zip(leaves, fixed, strict=True)]
        return step(*pytree.tree_unflatten(kept, spec))

    return of_tensors


__all__ = ["LossFunction", "Step", "call", "checked_loss", "functional_step", "step_graph", "traced"]
