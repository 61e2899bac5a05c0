"""`perexfx calibrate`: a machine profile from measurements, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from perexfx.bench.results import progress_bar
from perexfx.ir.cost_model import BUILT_IN, Machine
from perexfx.machine import save
from perexfx.machine.calibrate import Observation, first_touch, fit, observe, profile_name, quality
from perexfx.strategies import STRATEGIES


def run() -> None:
    """Measures, fits, keeps the profile, and says how well it fits."""
    console = Console()
    start = time.perf_counter()
    found: list[Observation] = []
    with progress_bar() as progress:
        task = progress.add_task("measuring sizes", total=None)
        for done, total, found in observe(STRATEGIES):  # noqa: B007
            progress.update(task, completed=done, total=total)
    machine = fit(found, profile_name(), {"first_touch": first_touch()})
    path = save(machine)
    console.print(f"{len(found)} timings in {time.perf_counter() - start:.0f} s", highlight=False)
    for profile in (BUILT_IN, machine):
        console.print(quality_in_words(profile, found), highlight=False)
    console.print(f"Kept in {path}; plans made from now on use it.", highlight=False, soft_wrap=True)


def quality_in_words(profile: Machine, observations: Sequence[Observation]) -> str:
    """How well a profile predicts some timings, and what its choices cost."""
    fits = quality(profile, observations)
    return (
        f"{profile.name}: predictions are off by {fits.error:.2f}x; the strategy it takes for the best one takes "
        f"{fits.regret:.3f}x the best one's time, {fits.worst[0]:.2f}x at worst ({fits.worst[1]})"
    )
