"""The arguments of a call by the names in its schema."""

from __future__ import annotations

import torch

from perexfx.ir.schemas import all_arguments, arguments_by_name, names_written


def test_arguments_have_the_names_of_the_schema() -> None:
    mean, add, into = torch.ops.aten.mean.dim, torch.ops.aten.add.Tensor, torch.ops.aten.add.out
    assert arguments_by_name(mean, ("x",), {"dim": [0]}) == {"self": "x", "dim": [0]}
    assert all_arguments(mean, ("x", [0]), {}) == {"self": "x", "dim": [0], "keepdim": False, "dtype": None}
    assert list(all_arguments(add, ("x",), {"alpha": 2, "other": "y"})) == ["self", "other", "alpha"]
    assert names_written(add) == []
    assert names_written(into) == ["out"]
