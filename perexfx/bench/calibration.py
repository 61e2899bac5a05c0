"""`perexfx calibrate`: a machine profile from measurements, with a progress bar."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perexfx.calibrate import Observation, fit, observe, profile_name, quality
from perexfx.ir.machine import BUILT_IN
from perexfx.profiles import save
from perexfx.strategies import STRATEGIES


def run() -> None:
    """Measures, fits, keeps the profile, and says how well it fits."""
    console = Console()
    start = time.perf_counter()
    found: list[Observation] = []
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TextColumn("sizes"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        for done, total, found in observe(STRATEGIES):  # noqa: B007
            progress.update(task, completed=done, total=total)
    machine = fit(found, profile_name())
    path = save(machine)
    console.print(f"{len(found)} timings in {time.perf_counter() - start:.0f} s", highlight=False)
    for profile in (BUILT_IN, machine):
        fits = quality(profile, found)
        console.print(
            f"{profile.name}: predictions are off by {fits.error:.2f}x; the strategy it takes for the best one takes "
            f"{fits.regret:.3f}x the best one's time, {fits.worst[0]:.2f}x at worst ({fits.worst[1]})",
            highlight=False,
        )
    console.print(f"Kept in {path}; plans made from now on use it.", highlight=False, soft_wrap=True)
