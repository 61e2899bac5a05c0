"""`embedding_bag` of `[examples, t]` ids: sums, means and maxima of looked-up rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Rows, RowsSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule


@dataclass(frozen=True)
class EmbeddingBag(Rule):
    """Each looked-up row gets its share of the bag's gradient: `n t v (one-hot ids), n t d -> n v d`."""

    kind = "embedding_bag"
    targets = (F.embedding_bag,)
    operands = ("weight",)
    inputs = ("input",)

    @staticmethod
    def named(
        input: Any,
        weight: Any,
        offsets: Any = None,
        max_norm: Any = None,
        norm_type: Any = 2.0,
        scale_grad_by_freq: Any = False,
        mode: Any = "mean",
        sparse: Any = False,
        per_sample_weights: Any = None,
        include_last_offset: Any = False,
        padding_idx: Any = None,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.embedding_bag`."""
        return dict(locals())

    def refuses(self, arguments: Arguments) -> str | None:
        """What mixes examples, or changes the table while reading it."""
        if arguments["scale_grad_by_freq"]:
            return "scale_grad_by_freq=True divides gradients by how often an id occurs in the whole batch"
        if arguments["max_norm"] is not None:
            return "max_norm rescales rows of the table in place while they are looked up"
        if arguments["sparse"]:
            return "sparse=True asks for sparse gradients, and clipped sums are dense"
        if arguments["offsets"] is not None:
            return "offsets spread the ids of an example over one axis; pass ids of shape [examples, ids]"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Rows of the table."""
        v, d = geometry.shapes["weight"]
        t = geometry.shapes["input"][1] * geometry.layouts["input"].repeats
        return {"weight": RowsSignature(geometry.n, t, v, d)}

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary layer."""
        names = ("mode", "per_sample_weights", "padding_idx")
        return F.embedding_bag(arguments["input"], arguments["weight"], **{n: arguments[n] for n in names}), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """The ids and their weights; the rows for the weights' gradient, and to find the largest."""
        names = ["input", "per_sample_weights"]
        if inputs or arguments["mode"] == "max":
            names.append("weight")
        return [name for name in names if isinstance(arguments[name], Tensor)]

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Each row's share: its weight, one over the count, or all of the entries where it is the largest."""
        ids, mode = call.arguments["input"], call.arguments["mode"]
        weights, padding_idx = call.arguments["per_sample_weights"], call.arguments["padding_idx"]
        v, d = call.geometry.shapes["weight"]
        if padding_idx is None:
            padding_idx = -1
        elif padding_idx < 0:
            padding_idx += v
        counted = (ids != padding_idx).to(call.grad_output.dtype)
        g = call.grad_output.unsqueeze(1)
        gradients: dict[str, Tensor] = {}
        if "per_sample_weights" in call.inputs:
            rows = F.embedding(ids, call.arguments["weight"])
            gradients["per_sample_weights"] = (rows * g).sum(2) * counted
        factors: dict[str, Factors] = {}
        if "weight" in call.operands:
            if mode == "max":
                share = _largest(ids, call.arguments["weight"], counted)
            elif mode == "mean":
                share = (counted / counted.sum(1, keepdim=True).clamp(min=1)).unsqueeze(2)
            else:
                share = (counted if weights is None else weights * counted).unsqueeze(2)
            layout = call.geometry.layouts["input"]
            n, t = call.geometry.n, ids.shape[1] * layout.repeats
            right = layout.examples_first(g * share).reshape(n, t, d)
            factors["weight"] = Rows(layout.examples_first(ids).reshape(n, t), right, v, padding_idx)
        return gradients, factors


def _largest(ids: Tensor, table: Tensor, counted: Tensor) -> Tensor:
    """One where a row has the largest entry of its bag, the first of equal ones; `[N, t, d]`."""
    rows = F.embedding(ids, table).masked_fill(counted.unsqueeze(2) == 0, -torch.inf)
    if rows.shape[1] == 0:
        return rows
    return torch.zeros_like(rows).scatter(1, rows.argmax(1, keepdim=True), 1.0)
