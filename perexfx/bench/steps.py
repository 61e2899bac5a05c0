"""The steps that are measured: forward, loss and backward of one batch, always the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import perexfx
from perexfx.bench.workloads import Workload

Step = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """A model and one batch, on one device.

    Attributes:
        model: In training mode.
        inputs: Examples on axis 0.
        targets: Examples on axis 0.
        loss: `(output, targets) -> scalar`, a mean over examples.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.inputs.shape[0]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def forget_gradients(self) -> None:
        """Frees every `.grad`."""
        for parameter in self.parameters:
            parameter.grad = None


def set_up(workload: Workload, device: torch.device) -> Setup:
    """A workload's model and batch: the same ones at every call, in every process."""
    torch.manual_seed(0)
    model, inputs, targets = workload.model(), workload.inputs(), workload.targets()
    return Setup(model.to(device), inputs.to(device), targets.to(device), workload.loss)


def ordinary(setup: Setup) -> Step:
    """The step without clipping."""
    return training_step(setup, setup.model)


def clipped(setup: Setup, clip_norm: float = 1.0) -> Step:
    """The same step on the transformed model."""
    return training_step(setup, perexfx.transform(setup.model, clip_norm=clip_norm))


def training_step(setup: Setup, module: nn.Module) -> Step:
    """Forward, loss and backward of a module that has the setup's Parameters; gradients are forgotten first."""

    def step() -> None:
        setup.forget_gradients()
        setup.loss(module(setup.inputs), setup.targets).backward()

    return step
