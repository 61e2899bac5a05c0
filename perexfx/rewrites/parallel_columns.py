"""Networks side by side, whose outputs are merged.

Promises: every column is run on the same input, and no two share a parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from perexfx.ir.errors import ArgumentError

MERGES = ("sum", "mean")


class ParallelColumns(nn.Module):
    """Columns on the same input, and the sum or the mean of their outputs.

    Attributes:
        columns: The networks.
        merge: "sum" or "mean".
    """

    def __init__(self, columns: Sequence[nn.Module], merge: str) -> None:
        super().__init__()
        self.columns = nn.ModuleList(columns)
        self.merge = merge

    def forward(self, x: Tensor) -> Tensor:
        """The merged outputs."""
        outputs = torch.stack([column(x) for column in self.columns])
        return outputs.sum(0) if self.merge == "sum" else outputs.mean(0)

    def extra_repr(self) -> str:
        """How its columns are merged."""
        return f"merge={self.merge}"


def parallel_columns(models: Sequence[nn.Module], merge: str = "sum") -> ParallelColumns:
    """A multi-column network: the models side by side on one input, and the sum or the mean of their outputs.

    Args:
        models: At least two, each with one input, and outputs of one shape. They are held, not copied.
        merge: "sum" or "mean".

    Returns:
        A module with the models in its `columns`.

    Raises:
        ArgumentError: These are no two models or more, some share a parameter, or `merge` is something else.
    """
    if merge not in MERGES:
        raise ArgumentError(f'`merge` should be "sum" or "mean". Found {merge!r}.')
    columns = list(models) if isinstance(models, Sequence | nn.ModuleList) else None
    if columns is None or len(columns) < 2:
        found = type(models).__name__ if columns is None else f"{len(columns)}"
        raise ArgumentError(f"`models` should be a list of at least two modules. Found {found}.")
    for at, column in enumerate(columns):
        if not isinstance(column, nn.Module):
            raise ArgumentError(f"`models[{at}]` should be a torch.nn.Module. Found {type(column).__name__}.")
    for (at, one), (beside, other) in combinations(enumerate(columns), 2):
        _refuse_shared(at, one, beside, other)
    return ParallelColumns(columns, merge)


def _refuse_shared(at: int, one: nn.Module, beside: int, other: nn.Module) -> None:
    """Raises: ArgumentError, naming what two columns share."""
    remedy = "Columns are networks of their own: pass copies (`copy.deepcopy`), or build them anew."
    if one is other:
        raise ArgumentError(f"`models[{at}]` and `models[{beside}]` are the same module. {remedy}")
    parameters = {id(parameter): name for name, parameter in one.named_parameters()}
    for name, parameter in other.named_parameters():
        if id(parameter) in parameters:
            raise ArgumentError(
                f"`models[{at}]` and `models[{beside}]` share a parameter, `{parameters[id(parameter)]}` and `{name}`. "
                f"{remedy}"
            )


__all__ = ["MERGES", "ParallelColumns", "parallel_columns"]
