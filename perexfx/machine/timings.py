"""Measuring: what a strategy takes on this machine, at real sizes.

Promises: random factors of a signature, in the format that the plan's images have; the time is that from the factors to
the clipped sum, norms included, as the median of interleaved repeats; what was measured once is remembered.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from perexfx.ir.convolution import Convolution, ConvolutionSignature
from perexfx.ir.cost import Cost
from perexfx.ir.cost_model import Machine
from perexfx.ir.factors import (
    Factors,
    Gradient,
    GradientSignature,
    Product,
    ProductSignature,
    Rows,
    RowsSignature,
    Signature,
)
from perexfx.ir.strategy import Strategy
from perexfx.machine.on_disk import current, folder, identity, load_measurements, save_measurements
from perexfx.runtime import in_format, random_state_kept

SECONDS = 0.02
"""Candidates are repeated for about this long."""
FEWEST, MOST = 3, 15
HOPELESS = 6.0
"""Candidates are not measured that are predicted to take this many times as long as the best prediction."""


def random_factors(signature: Signature, dtype: torch.dtype, device: torch.device) -> Factors:
    """Factors of given sizes, of random numbers."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    if isinstance(signature, GradientSignature):
        return Gradient(numbers(signature.n, *signature.shape))
    if isinstance(signature, ProductSignature):
        n, g, t, i, o = signature.n, signature.g, signature.t, signature.i, signature.o
        return Product(numbers(n, g, t, i), numbers(n, g, t, o), signature.shape)
    if isinstance(signature, RowsSignature):
        ids = torch.randint(0, max(1, signature.v), (signature.n, signature.t), device=device)
        return Rows(ids, numbers(signature.n, signature.t, signature.d), signature.v, -1)
    assert isinstance(signature, ConvolutionSignature), signature

    def images(channels: int, size: Sequence[int]) -> Tensor:
        found = numbers(signature.n * signature.frames, channels, *size)
        if signature.channels_last:
            found = in_format(found, torch.channels_last)
        return found.unflatten(0, (signature.n, signature.frames))

    return Convolution(
        images(signature.in_channels, signature.in_size),
        images(signature.out_channels, signature.out_size),
        signature.shape,
        signature.geometry,
    )


def measure(
    candidates: Sequence[Strategy], signature: Signature, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Seconds of every candidate, by name, from factors to the clipped sum. Random numbers of others stay theirs."""
    with random_state_kept([device]):
        factors = random_factors(signature, dtype, device)
        weights = torch.rand(signature.n, dtype=torch.promote_types(dtype, torch.float32), device=device)
    runs: dict[str, Callable[[], object]] = {
        strategy.name: lambda strategy=strategy: strategy.squared_norms(factors)[1].weighted_sum(weights)
        for strategy in candidates
    }
    return medians(runs, device)


def medians(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of several runs, taken in turn."""
    with torch.no_grad():
        first = {name: seconds_of(run, device) for name, run in runs.items()}
        repeats = {name: min(MOST, max(FEWEST, int(SECONDS / max(first[name], 1e-6)))) for name in runs}
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for at in range(max(repeats.values(), default=0)):
            for name, run in runs.items():
                if at < repeats[name]:
                    taken[name].append(seconds_of(run, device))
    return {name: statistics.median(found) for name, found in taken.items()}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """What one call takes, until its device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


@dataclass
class Measured:
    """A cost model that measures the candidates at each size, once.

    Attributes:
        machine: Says which candidates are worth a measurement, and what a layer's own work takes.
        dtype: Of the factors.
        device: Where they are.
        known: (device, dtype and size, strategy) -> seconds.
    """

    machine: Machine
    dtype: torch.dtype
    device: torch.device
    known: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def on_this_machine(cls, dtype: torch.dtype, device: torch.device) -> Measured:
        """With all that was measured on this machine before, which is read once."""
        return cls(current(), dtype, device, _remembered(str(folder()), identity()))

    @property
    def name(self) -> str:
        """For reports."""
        return f"measurements on this machine ({self.dtype})"

    def predict(self, candidates: Mapping[Strategy, Cost], signature: Signature) -> dict[Strategy, float]:
        """Seconds of every candidate at a size: measured, or predicted where it has no chance."""
        predicted = self.machine.predict(candidates, signature)
        least = min(predicted.values(), default=0.0)
        hopeful = [strategy for strategy, seconds in predicted.items() if seconds <= HOPELESS * least]
        missing = [strategy for strategy in hopeful if self._key(signature, strategy) not in self.known]
        if missing and signature.n > 0:
            found = measure(hopeful, signature, self.dtype, self.device)
            self.known.update({self._key(signature, strategy): found[strategy.name] for strategy in hopeful})
            save_measurements(self.known)
        return {
            strategy: self.known.get(self._key(signature, strategy), seconds) for strategy, seconds in predicted.items()
        }

    def seconds(self, cost: Cost) -> float:
        """Of what a layer does whatever the strategy: predicted."""
        return self.machine.seconds(cost)

    def _key(self, signature: Signature, strategy: Strategy) -> tuple[str, str]:
        kind = type(strategy)
        of = "" if kind.__module__.startswith("perexfx.") else f"{kind.__module__}.{kind.__qualname__}: "
        return f"{self.device.type} {self.dtype} {signature}", f"{of}{strategy.name}"


@cache
def _remembered(_folder: str, _identity: str) -> dict[tuple[str, str], float]:
    """Of one folder and machine: what `Measured` finds is added to it."""
    return load_measurements()
