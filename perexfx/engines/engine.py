"""How a method is called by its name: once on a batch, or as a step that trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from perexfx.engines.method import Method
from perexfx.engines.problem import Problem, StepResult
from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import GivenInputs
from perexfx.steps import LossFunction


class EngineStep:
    """`step(x, y) -> loss`: gradients by a method into `.grad`, and the optimizer's step where there is one.

    The model is captured at the first batch: its layers, and which parameters are trained, must stay what they are;
    modes may change where they may for `perexfx.transform`. Hooks of parameters are not run.

    Attributes:
        method: The method.
        result: What the last step found; None before.
    """

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer | None) -> None:
        self.method, self.optimizer = method, optimizer
        self.result: StepResult | None = None

    def __call__(self, x: GivenInputs, y: Any) -> Tensor:
        """One step on one batch. Returns: its loss, without a graph.

        Args:
            x: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
            y: Targets, passed to the loss function.
        """
        self.result = self.method(x, y)
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        for name, parameter in self.method.problem.trained.items():
            gradient = self.result.grads[name]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if self.optimizer is not None:
            self.optimizer.step()
        return self.result.loss


class Engine:
    """A whole-model method to clipped per-example gradients, by its name: `engine(model, loss_fn, x, y, clip_norm=C)`.

    Attributes:
        name: Of the method.
        also: What the papers call it.
    """

    def __init__(self, method: type[Method]) -> None:
        self._method = method
        self.name, self.also = method.name, method.also
        self.__doc__ = method.__doc__

    def __repr__(self) -> str:
        return f"perexfx.engines.{self.name}"

    def __call__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        x: GivenInputs,
        y: Any,
        *,
        clip_norm: float,
        loss_reduction: str = "mean",
        batch_dim: int = 0,
    ) -> StepResult:
        """Loss, norms and clipped sums of one batch; `.grad` is left alone.

        Args:
            model: As for `perexfx.transform`.
            loss_fn: `(model(x), y) -> scalar`, joining the examples as `loss_reduction` says.
            x: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
            y: Targets, passed to `loss_fn`: tensors with the examples on axis 0 or on `batch_dim`.
            clip_norm: C > 0.
            loss_reduction: "mean" or "sum".
            batch_dim: The example axis of the inputs.

        Raises:
            RefusedError: The method cannot treat the model: the layer and the reason are named.
            PerexError: As `perexfx.transform`.
        """
        return self._method(_checked(model, loss_fn, clip_norm, loss_reduction, batch_dim))(x, y)

    def step(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        clip_norm: float,
        loss_reduction: str = "mean",
        batch_dim: int = 0,
    ) -> EngineStep:
        """A callable `step(x, y) -> loss` that takes training steps by this method, as `perexfx.compile_step`'s does.

        Args:
            model: As for `perexfx.transform`.
            loss_fn: `(model(x), y) -> scalar`, joining the examples as `loss_reduction` says.
            optimizer: Of the model's parameters, or None: gradients are added to `.grad`.
            clip_norm: C > 0.
            loss_reduction: "mean" or "sum".
            batch_dim: The example axis of the inputs.
        """
        method = self._method(_checked(model, loss_fn, clip_norm, loss_reduction, batch_dim))
        return EngineStep(method, optimizer)


def _checked(model: nn.Module, loss_fn: LossFunction, clip_norm: float, loss_reduction: str, batch_dim: int) -> Problem:
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, int | float) or not 0 < clip_norm <= math.inf:
        raise ArgumentError(f"`clip_norm` should be a positive number. Found {clip_norm!r}.")
    if not callable(loss_fn):
        raise ArgumentError(f"`loss_fn` should be a function of output and targets. Found {type(loss_fn).__name__}.")
    if loss_reduction not in ("mean", "sum"):
        raise ArgumentError(f'`loss_reduction` should be "mean" or "sum". Found {loss_reduction!r}.')
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
    return Problem(model, loss_fn, clip_norm, loss_reduction, batch_dim)


__all__ = ["Engine", "EngineStep"]
