"""A machine, as far as the cost model knows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from perexfx.ir.cost import Cost, Work
from perexfx.ir.errors import ArgumentError
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
        try:
            return sum(self.rates[work.kind].seconds(work) for work in cost.work)
        except KeyError as error:
            raise ArgumentError(
                f"There is no rate for work of kind {error}, which the cost of a strategy or of a rule names. Kinds "
                f"are {', '.join(sorted(self.rates))}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; what costs nothing has no rate."""
        rates = {kind: [_finite(r.flop_rate), _finite(r.byte_rate), r.per_call] for kind, r in self.rates.items()}
        return {"name": self.name, "rates": rates}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Machine:
        """The inverse of `to_dict`.

        Raises:
            KeyError: A kind of work has no rate.
        """
        rates = {
            kind: Rate(math.inf if flops is None else flops, math.inf if moved is None else moved, per_call)
            for kind, (flops, moved, per_call) in given["rates"].items()
        }
        if missing := BUILT_IN.rates.keys() - rates.keys():
            raise KeyError(", ".join(sorted(missing)))
        return cls(given["name"], rates)


def _finite(rate: float) -> float | None:
    return None if math.isinf(rate) else rate


BUILT_IN = Machine(
    "built-in profile",
    {  # flop rate, byte rate, seconds per call
        "batched_gemm": Rate(2.01e11, 1.31e10, 1.0e-04),
        "cache": Rate(math.inf, 1.60e12, 1.1e-04),
        "convolution": Rate(2.56e11, 6.61e09, 2.0e-06),
        "convolution_kernel": Rate(math.inf, 1.02e10, 0.0e00),
        "convolution_last": Rate(2.56e11, 1.04e10, 2.0e-06),
        "convolution_last_kernel": Rate(math.inf, 3.23e09, 0.0e00),
        "convolution_weight": Rate(1.96e11, 6.74e10, 2.4e-04),
        "convolution_weight_grouped": Rate(1.76e11, 4.08e09, 2.8e-04),
        "convolution_weight_single": Rate(1.68e11, 5.08e09, 2.0e-04),
        "convolution_weight_thin": Rate(6.32e10, 2.60e09, 3.6e-05),
        "convolution_weight_thin_groups": Rate(1.47e10, math.inf, 1.5e-04),
        "direct": Rate(1.83e11, 3.09e10, 2.1e-04),
        "direct_depthwise": Rate(5.05e10, 2.29e10, 3.3e-05),
        "direct_product": Rate(1.64e11, 2.38e10, 1.0e-04),
        "first_touch": Rate(math.inf, 2.00e09, 0.0e00),
        "gemm": Rate(2.00e11, 1.73e10, 5.0e-05),
        "gram": Rate(1.05e11, math.inf, 7.9e-05),
        "group_norm": Rate(math.inf, 2.73e10, 1.8e-05),
        "group_norm_kernel": Rate(math.inf, 2.02e10, 2.0e-05),
        "group_norm_last": Rate(math.inf, 1.10e10, 2.0e-06),
        "index": Rate(math.inf, 1.15e10, 1.1e-04),
        "matrix_vector": Rate(1.72e10, math.inf, 2.7e-05),
        "max_pool": Rate(math.inf, 3.04e09, 2.0e-06),
        "max_pool_last": Rate(math.inf, 2.41e10, 9.6e-06),
        "memory": Rate(math.inf, 1.55e10, 2.0e-06),
        "reduce": Rate(2.88e10, math.inf, 9.2e-06),
        "shifted_squares": Rate(math.inf, 2.18e10, 0.0e00),
        "unfold": Rate(math.inf, 1.71e10, 2.0e-06),
    },
)
"""Fitted by `perexfx calibrate` to three runs of its grid on two cores of an AMD EPYC (Zen 4), torch 2.13, float32;
all but "first_touch", which a loop over one layer does not see: the system takes two microseconds for a page of memory.
Ratios carry over to other machines, seconds do not."""
