"""A machine, as far as the cost model knows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from perexfx.ir.cost import Cost, Work
from perexfx.ir.factors import Signature
from perexfx.ir.strategy import Strategy


class CostModel(Protocol):
    """What a plan asks for seconds."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    def predict(self, candidates: Mapping[Strategy, Cost], signature: Signature) -> dict[Strategy, float]:
        """Seconds of every candidate for factors of one size."""
        ...

    def seconds(self, cost: Cost) -> float:
        """Seconds of what a layer does whatever the strategy."""
        ...


@dataclass(frozen=True)
class Rate:
    """How fast one kind of work goes: `seconds = calls * per_call + flops / flop_rate + bytes / byte_rate`.

    Attributes:
        flop_rate: Floating-point operations per second.
        byte_rate: Bytes per second.
        per_call: Seconds per kernel started.
    """

    flop_rate: float
    byte_rate: float
    per_call: float

    def seconds(self, work: Work) -> float:
        """Predicted time of some work."""
        return work.calls * self.per_call + work.flops / self.flop_rate + work.bytes / self.byte_rate


@dataclass(frozen=True)
class Machine:
    """Rates per kind of work.

    Attributes:
        name: For reports.
        rates: Kind of work -> rate. Every kind that a strategy's cost names must be there.
    """

    name: str
    rates: Mapping[str, Rate]

    def predict(self, candidates: Mapping[Strategy, Cost], signature: Signature) -> dict[Strategy, float]:
        """Seconds of every candidate, from its cost alone."""
        return {strategy: self.seconds(cost) for strategy, cost in candidates.items()}

    def seconds(self, cost: Cost) -> float:
        """Predicted time of some work."""
        return sum(self.rates[work.kind].seconds(work) for work in cost.work)


BUILT_IN = Machine(
    "built-in profile",
    {  # flop rate, byte rate, seconds per call
        "batched_gemm": Rate(1.89e11, 3.01e10, 1.0e-07),
        "cache": Rate(math.inf, 2.15e11, 1.1e-06),
        "convolution_weight": Rate(3.79e11, 8.94e09, 2.8e-05),
        "convolution_weight_grouped": Rate(3.06e11, 6.79e09, 1.3e-06),
        "convolution_weight_single": Rate(4.08e11, 2.05e10, 4.1e-05),
        "fresh_memory": Rate(math.inf, 3.47e09, 0.0e00),
        "gemm": Rate(2.68e11, 1.47e10, 1.9e-05),
        "index": Rate(math.inf, 5.01e10, 2.3e-05),
        "matrix_vector": Rate(math.inf, math.inf, 1.2e-05),
        "memory": Rate(math.inf, 1.56e10, 1.0e-06),
        "unfold": Rate(math.inf, 1.5e10, 1.0e-05),
        "reduce": Rate(math.inf, 3.20e10, 0.0e00),
    },
)
"""Fitted to 481 timings of strategies (convolutions, linear layers, embeddings; 8 to 256 examples) on two cores of an
AMD EPYC with AVX-512, torch 2.13, float32; over that grid the chosen strategy takes 1.03 times the best one's time
(geometric mean). Ratios carry over to other machines, seconds do not."""
