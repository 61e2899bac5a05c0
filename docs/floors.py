"""The floors of `perexfx/`, as data: `tests/test_floors.py` holds the code to them, and the picture is drawn from them.

Run it with `python docs/floors.py`: it writes docs/pictures/floors.svg.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "pictures" / "floors.svg"


@dataclass(frozen=True)
class Room:
    """A folder or a file of `perexfx/`.

    Attributes:
        name: Of the folder, or of the file without its suffix.
        what: Its work, in a few words.
        doors: Its files that other rooms may import by themselves, beside the room; "*": all of them.
        is_family: Whether its list of files is the list of features, and may be long.
        is_to_come: Whether the room is kept for what is planned.
    """

    name: str
    what: str
    doors: tuple[str, ...] = ()
    is_family: bool = False
    is_to_come: bool = False


ALL = ("*",)
FLOORS: tuple[tuple[Room, ...], ...] = (
    (Room("__main__", "python -m perexfx"),),
    (Room("cli", "the command line"),),
    (Room("demo", "private training on real images"),),
    (Room("bench", "the measurements that anyone can repeat", ALL),),
    (Room("__init__", "what a user imports"),),
    (Room("views", "report, graph, ONNX: what was decided, to look at", ALL),),
    (
        Room(
            "inspecting",
            "check, proof, profile: what one may ask of a transformed module",
            ("check", "proof", "profile"),
        ),
    ),
    (Room("privacy", "noise, sampling, accounting", is_to_come=True),),
    (Room("engines", "the papers' whole-model methods"),),
    (Room("steps", "a whole step as one call: static graph, compiled, quantities"),),
    (Room("api", "transform(): the pipeline, top to bottom"),),
    (Room("guarding", "validation, monitor, fingerprint", is_to_come=True),),
    (
        Room("rehearsal", "what a step holds in memory at every moment"),
        Room("machine", "what work takes on this machine", ("calibrate",)),
    ),
    (Room("runtime", "the rewritten graph, and what its nodes do"),),
    (Room("rewrites", "graphs into other graphs: guided merges, smaller images"),),
    (Room("planning", "sites + strategies + machine + budget -> Plan"),),
    (Room("sites", "graph + layer rules -> sites; regions, segments"),),
    (Room("analysis", "which values carry examples, on which axis"),),
    (Room("capture", "nn.Module -> fx.Graph in functional form"),),
    (
        Room("schedules", "which batches of a training run reduced"),
        Room("layers", "a rule for each kind of site", ALL, is_family=True),
        Room("strategies", "ways to norms and clipped sums", ALL, is_family=True),
        Room("passes", "what works on a model alone", ALL, is_family=True),
    ),
    (Room("ir", "the nouns: site, factors, rule, strategy, cost", ALL, is_family=True),),
    (Room("kernels", "what multiplies: C++ and torch's libraries", ALL),),
)
"""From the top down. A room imports rooms of lower floors, and none of its own floor."""

WIDTH, LINE, GAP, MARGIN, COLUMN = 880, 18, 6, 10, 120
STYLE = """
text { font-family: system-ui, sans-serif; font-size: 13px; fill: #24292f }
.name { font-family: ui-monospace, monospace; font-weight: 600 }
rect { fill: #f6f8fa; stroke: #8c959f }
.family rect { fill: #ddf4ff; stroke: #54aeff }
.to-come rect { fill: none; stroke-dasharray: 4 3 }
.to-come text, .legend { fill: #6e7781 }
"""
LEGEND = (
    "Each room imports rooms of lower floors only. Blue: the list of files is the list of features. Dashed: to come."
)


def picture() -> str:
    """The floors as SVG, from the top down: families in blue, what is to come dashed."""
    rows, top = [], GAP
    for rooms in FLOORS:
        lines = 1 if len(rooms) == 1 else 2
        height = lines * LINE + 2 * GAP
        width = (WIDTH - GAP) / len(rooms) - GAP
        rows += [_box(room, GAP + at * (width + GAP), top, width, height) for at, room in enumerate(rooms)]
        top += height + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + LINE + GAP}" role="img">'
    title = "<title>The floors of perexfx: each room imports rooms of lower floors only</title>"
    legend = f'<text class="legend" x="{GAP + MARGIN}" y="{top + LINE - GAP / 2:g}">{LEGEND}</text>'
    return "\n".join([head, title, f"<style>{STYLE}</style>", *rows, legend, "</svg>"]) + "\n"


def _box(room: Room, left: float, top: int, width: float, height: int) -> str:
    """A room; beside others it is narrow, and what it is for stands below its name."""
    kind = "to-come" if room.is_to_come else "family" if room.is_family else "room"
    x, first = left + MARGIN, top + GAP + LINE - 5
    is_alone = height == LINE + 2 * GAP
    where = (x + COLUMN, first) if is_alone else (x, first + LINE)
    what = escape(room.what) + (" (to come)" if room.is_to_come else "")
    return (
        f'<g class="{kind}"><rect x="{left:g}" y="{top}" width="{width:g}" height="{height}" rx="4"/>'
        f'<text class="name" x="{x:g}" y="{first}">{escape(room.name)}</text>'
        f'<text x="{where[0]:g}" y="{where[1]}">{what}</text></g>'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture())
