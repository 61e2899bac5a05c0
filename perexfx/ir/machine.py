"""A machine, as far as the cost model knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from perexfx.ir.cost import Cost, Work


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

    def seconds(self, cost: Cost) -> float:
        """Predicted time of a strategy."""
        return sum(self.rates[work.kind].seconds(work) for work in cost.work)

    def __reduce__(self) -> tuple[type, tuple[str, Mapping[str, Rate]]]:
        return _machine, (self.name, dict(self.rates))


def _machine(name: str, rates: Mapping[str, Rate]) -> Machine:
    return Machine(name, MappingProxyType(dict(rates)))


BUILT_IN = _machine(
    "built-in profile",
    {
        "gemm": Rate(flop_rate=2.2e11, byte_rate=2.0e10, per_call=1.0e-5),
        "batched_gemm": Rate(flop_rate=1.6e11, byte_rate=2.0e10, per_call=1.0e-6),
        "convolution_weight": Rate(flop_rate=4.0e11, byte_rate=2.0e10, per_call=5.0e-5),
        "convolution_weight_single": Rate(flop_rate=4.0e11, byte_rate=2.5e9, per_call=4.0e-5),
        "convolution_weight_grouped": Rate(flop_rate=3.0e11, byte_rate=1.2e9, per_call=1.0e-5),
        "matrix_vector": Rate(flop_rate=1.0e12, byte_rate=1.5e10, per_call=1.0e-5),
        "reduce": Rate(flop_rate=1.0e12, byte_rate=1.5e10, per_call=1.0e-5),
        "memory": Rate(flop_rate=1.0e12, byte_rate=1.0e10, per_call=1.0e-5),
        "cache": Rate(flop_rate=1.0e12, byte_rate=5.0e10, per_call=5.0e-6),
        "index": Rate(flop_rate=1.0e12, byte_rate=2.0e9, per_call=1.5e-5),
    },
)
"""Measured on two cores of an AMD EPYC with AVX-512, torch 2.13, float32; ratios carry over, seconds do not."""
