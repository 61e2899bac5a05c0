"""The forward's inputs: which tensors carry examples, how many, and all else that a plan depends on.

Promises: the same kind of input always gives an equal value, whatever its batch size; inputs that disagree about the
number of examples are an error that shows their shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.errors import ArgumentError


@dataclass(frozen=True)
class Inputs:
    """The shapes of one kind of input: all a plan depends on besides the batch size.

    Attributes:
        names: Of the tensors among the forward's arguments.
        shapes: With 0 in place of the batch size, where a tensor carries examples.
        dtypes: Their dtypes.
        devices: Their devices.
        carriers: Which of them carry examples.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]
    carriers: tuple[bool, ...]

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], batch_dim: int, carriers: tuple[bool, ...] | None = None
    ) -> tuple[Inputs, int]:
        """The kind of some inputs, and their batch size.

        Args:
            arguments: The forward's arguments by name; those that are no tensors are left out.
            batch_dim: The example axis of the inputs.
            carriers: Which tensors carry examples; None: those that have the first one's size along that axis.

        Raises:
            ArgumentError: No tensor has an axis `batch_dim`, or they disagree about the number of examples.
        """
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        if carriers is None or len(carriers) != len(tensors):
            first = next((value.shape[batch_dim] for value in tensors.values() if value.dim() > batch_dim), None)
            carriers = tuple(t.dim() > batch_dim and t.shape[batch_dim] == first for t in tensors.values())
        found = {
            name: value.shape[batch_dim] if value.dim() > batch_dim else None
            for (name, value), carries in zip(tensors.items(), carriers, strict=True)
            if carries
        }
        sizes = set(found.values())
        if not sizes or None in sizes or len(sizes) > 1:
            shapes = ", ".join(f"`{name}` of shape {list(value.shape)}" for name, value in tensors.items())
            others = ", ".join(
                f"`{name}` of type {type(value).__name__}" for name, value in arguments.items() if name not in tensors
            )
            problem = "disagree about the number of examples" if len(sizes) > 1 else "have no axis for the examples"
            raise ArgumentError(
                f"The inputs {problem} on axis {batch_dim}. Found {'; '.join(filter(None, (shapes, others)))}. "
                "Pass tensors with the examples on the axis that `batch_dim` names."
            )
        shapes = tuple(
            (*t.shape[:batch_dim], 0, *t.shape[batch_dim + 1 :]) if carries else tuple(t.shape)
            for t, carries in zip(tensors.values(), carriers, strict=True)
        )
        dtypes, devices = tuple(t.dtype for t in tensors.values()), tuple(t.device for t in tensors.values())
        (n,) = sizes
        assert n is not None
        return cls(tuple(tensors), shapes, dtypes, devices, carriers), n
