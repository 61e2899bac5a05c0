"""`embedding` of ids of any shape."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from perexfx.ir.factors import Factors, Rows, RowsSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Rule


@dataclass(frozen=True)
class Embedding(Rule):
    """Rows of a table: `n t v (one-hot ids), n t d -> n v d`, never formed unless asked to be."""

    kind = "embedding"
    targets = (F.embedding,)
    operands = ("weight",)
    inputs = ("input",)

    @staticmethod
    def named(
        input: Any,
        weight: Any,
        padding_idx: Any = None,
        max_norm: Any = None,
        norm_type: Any = 2.0,
        scale_grad_by_freq: Any = False,
        sparse: Any = False,
    ) -> dict[str, Any]:
        """As `torch.nn.functional.embedding`."""
        return dict(locals())

    def refuses(self, arguments: Arguments) -> str | None:
        """What mixes examples, or changes the table while reading it."""
        if arguments["scale_grad_by_freq"]:
            return "scale_grad_by_freq=True divides gradients by how often an id occurs in the whole batch"
        if arguments["max_norm"] is not None:
            return "max_norm rescales rows of the table in place while they are looked up"
        if arguments["sparse"]:
            return "sparse=True asks for sparse gradients, and clipped sums are dense"
        return None

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        """Rows of the table."""
        v, d = geometry.shapes["weight"]
        t = math.prod(geometry.shapes["input"]) // geometry.n if geometry.n else 0
        return {"weight": RowsSignature(geometry.n, t, v, d)}

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ordinary lookup."""
        return F.embedding(arguments["input"], arguments["weight"], arguments["padding_idx"]), ()

    def reads(self, arguments: Arguments, inputs: Collection[str], operands: Collection[str]) -> Collection[str]:
        """The ids."""
        return ("input",)

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        """Ids have no gradient."""
        v, d = call.geometry.shapes["weight"]
        ids = call.examples_first("input")
        n, t = ids.shape[0], math.prod(ids.shape[1:])
        padding_idx = call.arguments["padding_idx"]
        if padding_idx is None:
            padding_idx = -1
        elif padding_idx < 0:
            padding_idx += v
        right = call.grad_output_examples_first.reshape(n, t, d)
        return {}, {"weight": Rows(ids.reshape(n, t), right, v, padding_idx)}
