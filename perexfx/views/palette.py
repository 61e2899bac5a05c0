"""One colour per strategy, the same in every view.

Related strategies have related colours: Gram matrices are blue, formed gradients orange, torch's own kernels green, a
kernel of ours lime, second backwards turquoise. All keep their contrast with black text, and differ in lightness too,
for readers who do not tell hues apart.
"""

from __future__ import annotations

STRATEGIES = {
    "outer": "#c9a8f0",
    "gram": "#7db4f5",
    "gram_shift": "#a9dcf7",
    "materialize": "#f2a65a",
    "materialize_norms": "#fbd38d",
    "direct": "#d6d84b",
    "direct_norms": "#ebecab",
    "grouped": "#5ec29a",
    "loop": "#a5dfb4",
    "loop_norms": "#d3efc6",
    "reweight": "#83d3d0",
}
"""Strategy -> colour."""

OTHER = "#d5d8de"
"""Of strategies that are none of ours."""

CLIP = "#e5484d"
NORM = "#f7c9cc"
FORMAT = "#e6e0f8"
CUT = "#d2f0ee"
REWRITTEN = "#fbeec2"
MODEL = "#ffffff"
FOLDED = "#eef1f6"
"""Of a module that is folded into a node and has no sites."""
BOX, FRAME = "#f7f8fa", "#d0d5dd"
"""Of an unfolded module: inside and border."""
INK, SOFT, FAINT = "#1b1f24", "#667085", "#98a2b3"
"""Of text, the last for what hardly matters."""
EDGE = "#8a93a2"


def color_of(strategy: str) -> str:
    """The colour of a strategy."""
    return STRATEGIES.get(strategy, OTHER)


def heat_of(share: float) -> str:
    """From white to red, with black text readable on all of it; what is no number is grey."""
    if not 0 <= share <= 1:
        return OTHER
    light = (255, 255, 255), (242, 139, 117)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*light, strict=True))


PARTS = {
    "clip": CLIP,
    "norm": NORM,
    "cut": CUT,
    "format": FORMAT,
    "rewritten": REWRITTEN,
    "folded": FOLDED,
    "box": BOX,
    "frame": FRAME,
    "ink": INK,
    "soft": SOFT,
    "edge": EDGE,
}
"""What pages draw themselves."""

__all__ = [
    "BOX",
    "CLIP",
    "CUT",
    "EDGE",
    "FAINT",
    "FOLDED",
    "FORMAT",
    "FRAME",
    "INK",
    "MODEL",
    "NORM",
    "OTHER",
    "PARTS",
    "REWRITTEN",
    "SOFT",
    "STRATEGIES",
    "color_of",
    "heat_of",
]
