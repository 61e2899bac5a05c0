"""`perexfx.interleave`: a model and its reduced form, batch by batch, as a schedule says.

Promises: both share their parameters, so that one optimizer trains both; evaluation is always that of the full model;
its statistics of normalisations over the batch come from full batches alone, or are estimated afresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from perexfx.ir.errors import ArgumentError, ModeError
from perexfx.schedules import Schedule

STATISTICS = ("full", "reestimated")


def interleave(full: nn.Module, reduced: nn.Module, schedule: Schedule, statistics: str = "full") -> Interleaved:
    """A module to train in the usual loop, some of whose batches run reduced.

    For private training both are transformed first: `interleave(transform(model, x), transform(downsample(model, x),
    x), schedule)`; `.last` is the module of the last forward, whose `perexfx.norms` are those of the batch. A reduced
    batch costs as much privacy as a full one.

    Args:
        full: The model.
        reduced: From `perexfx.downsample` of the same model.
        schedule: From `perexfx.schedules`.
        statistics: Of normalisations over the batch. "full": they come from full batches alone. "reestimated": they are
            estimated afresh by `reestimate(batches)`, before which evaluation is an error.

    Raises:
        ArgumentError: An argument is not what it should be, or the models do not share their parameters.
    """
    for name, module in (("full", full), ("reduced", reduced)):
        if not isinstance(module, nn.Module):
            raise ArgumentError(f"`{name}` should be a torch.nn.Module. Found {type(module).__name__}.")
    if not isinstance(schedule, Schedule):
        raise ArgumentError(f"`schedule` should be one of `perexfx.schedules`. Found {schedule!r}.")
    if statistics not in STATISTICS:
        raise ArgumentError(f"`statistics` should be one of {', '.join(map(repr, STATISTICS))}. Found {statistics!r}.")
    others = set(map(id, full.parameters())) ^ set(map(id, reduced.parameters()))
    if others:
        named = [*full.named_parameters(), *reduced.named_parameters()]
        name = next(name for name, parameter in named if id(parameter) in others)
        raise ArgumentError(
            f"`full` and `reduced` should share their parameters, and `{name}` is in one of them alone. Make the "
            "second from the first: `perexfx.downsample(model, x)`; and move models to a device before."
        )
    return Interleaved(full, reduced, schedule, statistics)


class Interleaved(nn.Module):
    """What `perexfx.interleave` returns.

    Attributes:
        full: The model.
        reduced: Its reduced form.
        schedule: Which batches are reduced.
        statistics: Where statistics of normalisations over the batch come from.
        steps: Forwards in training mode so far; a buffer.
        last: The one of both that ran last; None before the first forward.
    """

    steps: Tensor
    is_estimated: Tensor

    def __init__(self, full: nn.Module, reduced: nn.Module, schedule: Schedule, statistics: str) -> None:
        super().__init__()
        self.full, self.reduced = full, reduced
        self.schedule, self.statistics = schedule, statistics
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("is_estimated", torch.tensor(statistics == "full"))
        object.__setattr__(self, "last", None)  # as an attribute that is no further submodule
        self.train(full.training)

    last: nn.Module | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The full or the reduced model on a batch: in training as the schedule says, else the full one."""
        if self.training:
            chosen = self.reduced if self.schedule.is_reduced(int(self.steps)) else self.full
            self.steps.add_(1)
            if self.statistics == "reestimated":
                self.is_estimated.fill_(False)
        else:
            if not bool(self.is_estimated):
                raise ModeError(
                    "The statistics of normalisations over the batch are to be estimated afresh before evaluation. "
                    'Call `.reestimate(batches)` with batches of inputs, or interleave with `statistics="full"`.'
                )
            chosen = self.full
        object.__setattr__(self, "last", chosen)
        return chosen(*args, **kwargs)

    @torch.no_grad()
    def reestimate(self, batches: Iterable[Any]) -> None:
        """Estimates the statistics of normalisations over the batch: means over all batches, of the full model.

        Args:
            batches: Inputs of the model: tensors, tuples of positional inputs, or dicts of keyword inputs.

        Raises:
            ArgumentError: There are no batches.
        """
        layers = [module for module in self.full.modules() if isinstance(module, _BatchNorm)]
        count = 0
        with _estimating(self.full, layers):
            for batch in batches:
                if isinstance(batch, dict):
                    self.full(**batch)
                else:
                    self.full(*(batch if isinstance(batch, tuple | list) else (batch,)))
                count += 1
        if not count:
            raise ArgumentError("`batches` should hold one batch of inputs at least. Found none.")
        self.is_estimated.fill_(True)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"{self.schedule}, statistics={self.statistics!r}, steps={int(self.steps)}"


@contextmanager
def _estimating(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Layers whose statistics begin anew and are plain means; modes are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    model.train()
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training


__all__ = ["Interleaved", "interleave"]
