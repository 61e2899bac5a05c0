"""Every strategy on a grid of layers and batch sizes: predicted against measured, in seconds and in bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perexfx.bench.calibration import quality_in_words
from perexfx.bench.measure import FEWEST
from perexfx.bench.memory import peak_allocation
from perexfx.bench.plots import points
from perexfx.bench.results import Sheet, progress_bar, publish
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost
from perexfx.ir.cost_model import BUILT_IN, Machine
from perexfx.ir.factors import GradientSignature, ProductSignature, RowsSignature, Signature
from perexfx.ir.strategy import Strategy
from perexfx.machine import current, measure, random_factors
from perexfx.machine.calibrate import Observation, describe, quality, signatures
from perexfx.strategies import STRATEGIES

ITEMSIZE = 4
LONGEST = 0.1
"""Seconds that a strategy may take by the current profile, or it is not measured."""
HOPELESS = 20.0
"""Nor is one that is predicted to take this many times as long as the best prediction."""
LARGEST = 1 << 30
"""Bytes that factors, or what a strategy allocates, may take."""
CLOSE = 1.1
"""Choices that cost more than this are measured again: most such differences are noise."""
LIMIT = 3.0
"""Seconds after which one case is not measured again any more, once it was `FEWEST` times."""


@dataclass(frozen=True)
class Case:
    """One layer at one batch size, under every strategy.

    Attributes:
        signature: Sizes of its factors.
        observations: One per strategy, with its predicted cost.
        allocated: Name of a strategy -> bytes: the most that its norms allocate, and the factors it keeps.
    """

    signature: Signature
    observations: Sequence[Observation]
    allocated: Mapping[str, int]

    def chosen(self, profile: Machine) -> Observation:
        """The strategy that a plan takes."""
        return min(self.observations, key=lambda seen: profile.seconds(seen.cost))

    @property
    def best(self) -> Observation:
        """The fastest one."""
        return min(self.observations, key=lambda seen: seen.seconds)

    def regret(self, profile: Machine) -> float:
        """Time of the strategy that a plan takes / the fastest one's."""
        return quality(profile, self.observations).regret


def run(
    rounds: int,
    device: torch.device,
    out: Path | None,
    grid: Sequence[Signature] | None = None,
) -> list[Case]:
    """Measures every strategy, shows a table, and writes it with the machine's description.

    Args:
        rounds: How many times a choice that seems bad is measured again, at most.
        device: Where the factors are.
        out: Folder for the files; None: show only.
        grid: Layers at batch sizes; None: those that calibrations are made on, at a quarter, once and four times
            their batch sizes.
    """
    cases = []
    profile = current()
    worth = [found for each in (all_sizes() if grid is None else grid) if (found := _worth(each, profile))]
    with progress_bar() as progress:
        task = progress.add_task("", total=len(worth))
        for signature, costs in worth:
            progress.update(task, description=describe(signature))
            cases.append(remeasured(_measured(signature, costs, device), _profiles(), rounds, device))
            progress.advance(task)
    publish(_sheet(cases, rounds), partial(_draw, cases, profile), device, out)
    return cases


def all_sizes() -> list[Signature]:
    """The grid of calibrations at a quarter, once and four times its batch sizes."""
    every = [_with_batch(signature, n) for signature in signatures() for n in _batches(signature.n)]
    return list(dict.fromkeys(every))


def _batches(n: int) -> list[int]:
    return sorted({max(1, n // 4), n, 4 * n})


def _with_batch(signature: Signature, n: int) -> Signature:
    assert isinstance(signature, GradientSignature | ProductSignature | RowsSignature | ConvolutionSignature)
    return replace(signature, n=n)


def _profiles() -> list[Machine]:
    """The built-in one, and this machine's own where there is one."""
    return [BUILT_IN] if current() is BUILT_IN else [BUILT_IN, current()]


def _worth(signature: Signature, profile: Machine) -> tuple[Signature, dict[Strategy, Cost]] | None:
    """The strategies that are measured, with their costs; None where there are none."""
    costs = {s: s.cost(signature, ITEMSIZE) for s in STRATEGIES if s.refuses(signature) is None}
    predicted = profile.predict(costs, signature)
    longest = min(LONGEST, HOPELESS * min(predicted.values()))
    fits = ITEMSIZE * signature.held_elements <= LARGEST
    found = {s: c for s, c in costs.items() if fits and predicted[s] <= longest and predicted_bytes(c) <= LARGEST}
    return (signature, found) if found else None


def predicted_bytes(cost: Cost) -> int:
    """What is held, and the most that is alive on top of it."""
    return cost.bytes_held + cost.bytes_transient


def _measured(signature: Signature, costs: Mapping[Strategy, Cost], device: torch.device) -> Case:
    seconds = measure(list(costs), signature, torch.float32, device)
    what = describe(signature)
    observations = [Observation(what, s.name, cost, seconds[s.name]) for s, cost in costs.items()]
    return Case(signature, observations, {s.name: _bytes_of(s, signature, device) for s in costs})


def _bytes_of(strategy: Strategy, signature: Signature, device: torch.device) -> int:
    """What the norms allocate at most, and the factors among what is held until the clip node."""
    factors = random_factors(signature, torch.float32, device)
    given = dict(_storages(factors))
    with torch.no_grad():
        _, held = strategy.squared_norms(factors)  # libraries set up what they need once
        kept = {memory: size for memory, size in _storages(held) if memory in given}
        del held
        return peak_allocation(lambda: strategy.squared_norms(factors), device) + sum(kept.values())


def _storages(value: object) -> Iterator[tuple[int, int]]:
    """Address and bytes of every tensor's memory in a dataclass."""
    if isinstance(value, Tensor):
        yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
    elif isinstance(value, tuple):
        for part in value:
            yield from _storages(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _storages(getattr(value, field.name))


def remeasured(case: Case, profiles: Sequence[Machine], rounds: int, device: torch.device) -> Case:
    """The same case, its strategies measured again where a profile's choice seems bad.

    Args:
        case: As measured at first.
        profiles: Whose choices to look at.
        rounds: How often they are measured, at most; the median counts.
        device: Where the factors are.
    """
    bad = [case.chosen(profile).seconds for profile in profiles if case.regret(profile) > CLOSE]
    dearest = max(bad, default=0.0)
    names = {seen.name for seen in case.observations if seen.seconds <= dearest}
    if not names:
        return case
    rivals = [strategy for strategy in STRATEGIES if strategy.name in names]
    start, taken = time.perf_counter(), []
    while len(taken) < rounds and (len(taken) < FEWEST or time.perf_counter() - start < LIMIT):
        taken.append(measure(rivals, case.signature, torch.float32, device))
    again = {name: statistics.median(seconds[name] for seconds in taken) for name in names}
    return replace(
        case, observations=[replace(seen, seconds=again.get(seen.name, seen.seconds)) for seen in case.observations]
    )


def _sheet(cases: Sequence[Case], rounds: int) -> Sheet:
    profile = current()
    observations = [seen for case in cases for seen in case.observations]
    by_layer: dict[Signature, list[Case]] = {}
    for case in cases:
        by_layer.setdefault(_with_batch(case.signature, 0), []).append(case)
    worst = [max(group, key=lambda case: case.regret(profile)) for group in by_layer.values()]
    return Sheet(
        "layers",
        f"strategies on {len(cases)} sizes of layers; of each layer the batch size with the largest regret",
        ("batch x layer", "chosen", "best", "regret", "predicted\nms", "measured\nms", "predicted\nMB", "measured\nMB"),
        [_row(case, profile) for case in worst],
        [quality_in_words(profile, observations) for profile in _profiles()],
        {"rounds": rounds, "profile": profile.name, "quality": _qualities(observations), "cases": _raw(cases)},
    )


def _row(case: Case, profile: Machine) -> list[str]:
    chosen = case.chosen(profile)
    return [
        describe(case.signature),
        chosen.name,
        case.best.name,
        f"{case.regret(profile):.2f}",
        f"{profile.seconds(chosen.cost) * 1e3:.3f}",
        f"{chosen.seconds * 1e3:.3f}",
        f"{predicted_bytes(chosen.cost) / 1e6:.2f}",
        f"{case.allocated[chosen.name] / 1e6:.2f}",
    ]


def _qualities(observations: Sequence[Observation]) -> dict[str, Any]:
    return {profile.name: asdict(quality(profile, observations)) for profile in _profiles()}


def _raw(cases: Sequence[Case]) -> list[dict[str, Any]]:
    profile = current()
    return [
        {
            "case": seen.what,
            "strategy": seen.name,
            "predicted_seconds": profile.seconds(seen.cost),
            "seconds": seen.seconds,
            "predicted_bytes": predicted_bytes(seen.cost),
            "bytes": case.allocated[seen.name],
            "is_chosen": seen is case.chosen(profile),
        }
        for case in cases
        for seen in case.observations
    ]


def _draw(cases: Sequence[Case], profile: Machine, figure: Figure) -> None:
    figure.set_size_inches(10, 5.6)
    left, right = figure.subplots(1, 2)

    def of(value: Callable[[Case, Observation], tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {strategy.name: [] for strategy in STRATEGIES}
        for case in cases:
            for seen in case.observations:
                found[seen.name].append(value(case, seen))
        return found

    points(left, of(lambda _, seen: (profile.seconds(seen.cost) * 1e3, seen.seconds * 1e3)))
    left.set(xlabel="predicted ms", ylabel="measured ms")
    points(right, of(lambda case, seen: (predicted_bytes(seen.cost) / 1e6, case.allocated[seen.name] / 1e6)))
    right.set(xlabel="predicted MB", ylabel="measured MB")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
