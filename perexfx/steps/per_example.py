"""Per-example quantities without training: norms, gradients and their inner products.

Promises: `.grad` and the model are left as they were. Each function transforms the model, runs one forward and one
backward, and reads what its sites left behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perexfx.api import transform
from perexfx.runtime import StepOptions, Transformed, stepping
from perexfx.steps.graph import LossFunction, call


def per_example_norms(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    *,
    loss_reduction: str = "mean",
    batch_dim: int = 0,
) -> Tensor:
    """The gradient norm of each example's own loss, over all trainable parameters together. Shape `[B]`.

    Args:
        model: As for `perexfx.transform`.
        loss_fn: `(model(x), y) -> scalar`, joining the examples as `loss_reduction` says.
        x: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        y: Targets, passed to `loss_fn`.
        loss_reduction: "mean" or "sum".
        batch_dim: The example axis of the inputs.

    Raises:
        PerexError: As `perexfx.transform`.
    """
    gm = transform(model, x, clip_norm=None, loss_reduction=loss_reduction, batch_dim=batch_dim)
    _backward(gm, loss_fn, x, y)
    assert gm.perexfx.norms is not None
    return gm.perexfx.norms


def per_example_grads(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    *,
    loss_reduction: str = "mean",
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """The gradient of each example's own loss: parameter name -> `[B, *shape]`, for every trainable parameter.

    A parameter that no example reaches has zeros. Takes B times the memory of the parameters.

    Arguments and errors are those of `perexfx.per_example_norms`.
    """
    gm = transform(model, x, clip_norm=None, loss_reduction=loss_reduction, batch_dim=batch_dim, strategy="materialize")
    found: dict[str, Tensor] = {}
    _backward(gm, loss_fn, x, y, StepOptions(gradients_to=found.update))
    assert gm.perexfx.plan is not None
    n = gm.perexfx.plan.batch_size
    return {
        name: found[name] if name in found else parameter.new_zeros(n, *parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradient_gram(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Any,
    y: Any,
    *,
    loss_reduction: str = "mean",
    batch_dim: int = 0,
) -> Tensor:
    """Inner products of the examples' gradients, over all trainable parameters together. Shape `[B, B]`.

    Its diagonal is the squared norms. Takes the memory of `per_example_grads`.

    Arguments and errors are those of `perexfx.per_example_norms`.
    """
    gradients = per_example_grads(model, loss_fn, x, y, loss_reduction=loss_reduction, batch_dim=batch_dim)
    flat = [gradient.flatten(1) for gradient in gradients.values()]
    return torch.stack([rows @ rows.t() for rows in flat]).sum(0)


def _backward(gm: Transformed, loss_fn: LossFunction, x: Any, y: Any, options: StepOptions = StepOptions()) -> None:  # noqa: B008 (a frozen value)
    """One forward and backward that leave `.grad` alone."""
    trainable = [parameter for parameter in gm.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss_fn(call(stepping(gm, options), x), y), trainable, allow_unused=True)
