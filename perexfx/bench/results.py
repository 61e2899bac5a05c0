"""What every table of the bench ends in: shown on the console, and three files."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from perexfx import kernels
from perexfx.machine import processor


@dataclass(frozen=True)
class Sheet:
    """One table of results, in words, and the numbers behind it.

    Attributes:
        name: Of its files.
        title: Above it.
        headings: Of the columns; the first one's cells are names, the others' are numbers.
        rows: Their cells.
        notes: Sentences below it.
        raw: The numbers, as JSON takes them.
    """

    name: str
    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    raw: Mapping[str, Any]


def publish(sheet: Sheet, draw: Callable[[Figure], None], device: torch.device, out: Path | None) -> None:
    """Shows a sheet; with a folder, also writes `<name>.json`, `<name>.md` and `<name>.png`.

    Args:
        sheet: What to show.
        draw: Draws the numbers on an empty figure.
        device: What they were measured on.
        out: Folder; None: show only.
    """
    console = Console()
    if not console.is_terminal:
        console.width = 160  # else tables in files and pipes are cut to 80 columns
    console.print(_shown(sheet))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    described = machine(device)
    (out / f"{sheet.name}.json").write_text(json.dumps({"machine": described, **sheet.raw}, indent=1) + "\n")
    (out / f"{sheet.name}.md").write_text(_markdown(sheet, described))
    figure = Figure(layout="constrained", dpi=120)
    draw(figure)
    figure.savefig(out / f"{sheet.name}.png")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": kernels.level(),
    }
    return {**found, "gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else found


class _Lines(Progress):
    """A bar where there is a terminal; elsewhere, in logs, a line for everything that is begun."""

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As ever."""
        super().update(task_id, **changes)
        if "description" in changes and not self.console.is_terminal:
            task = next(task for task in self.tasks if task.id == task_id)
            print(f"[{task.completed:g}/{task.total:g}] {task.description}", flush=True)


def progress_bar() -> Progress:
    """A bar that goes away at the end: what is measured, how many are done, how long it took."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return _Lines(*columns, transient=True)


def _shown(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, caption="\n".join(sheet.notes), caption_justify="left")
    for at, heading in enumerate(sheet.headings):
        table.add_column(heading, justify="right" if at else "left")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _markdown(sheet: Sheet, described: Mapping[str, Any]) -> str:
    headings = [heading.replace("\n", " ") for heading in sheet.headings]
    rules = ["---:" if at else "---" for at in range(len(headings))]
    table = [f"| {' | '.join(cells)} |" for cells in (headings, rules, *sheet.rows)]
    where = f"{described['gpu']}, with " if "gpu" in described else ""
    line = (
        f"{where}{described['processor']}, {described['cores']} cores, {described['threads']} threads, "
        f"torch {described['torch']}, Python {described['python']}, kernels {described['kernels']}"
    )
    notes = "".join(f"{note}\n\n" for note in sheet.notes)
    return (
        f"# {sheet.title[:1].upper()}{sheet.title[1:]}\n\n{line}\n\n"
        + "\n".join(table)
        + f"\n\n{notes}".rstrip()
        + "\n"
    )
