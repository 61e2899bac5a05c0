"""`perexfx.visualize`: the graph of the rewrites, in the format that the file's suffix names.

Promises: every format shows the same drawing; the page is one file and needs no network; nothing is drawn that is not
in the graph, and nothing of the graph is lost but parameters and tapes, which their readers list.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from perexfx.ir.errors import ArgumentError, RefusedError
from perexfx.rewrites import Rewritten
from perexfx.views.dot import render, to_dot
from perexfx.views.drawing import drawing_of
from perexfx.views.files import write_file
from perexfx.views.graph_page import graph_page
from perexfx.views.model_explorer import write_model_explorer
from perexfx.views.rewritten_drawing import drawing_of_rewrite

SUFFIXES = (".html", ".dot", ".svg", ".png", ".json")


def visualize(subject: nn.Module | RefusedError, path: str | Path, *, depth: int | None = None) -> Path:
    """Draws the graph before and after the rewrite.

    - `.html`: a page of its own, without network: both graphs side by side, modules that fold and unfold, the report's
      row of whatever is selected, search, colours by strategy, heat by predicted time or bytes.
    - `.svg`, `.png`: a picture, by Graphviz, which must be installed; `.dot`: the text that it is drawn from.
    - `.json`: for Google's Model Explorer (`model-explorer graph.json`), with node data beside it for strategies and
      predicted seconds and bytes: `graph.strategy.json`, `graph.seconds.json`, `graph.bytes.json`.

    Args:
        subject: From `perexfx.transform`; or what a rewrite returned, as `perexfx.downsample`; or the error by which a
            model was refused: the culprits are marked.
        path: The file to write; its suffix is the format.
        depth: How many levels of modules are unfolded in pictures, and when a page opens. None: as many as can be read
            at once.

    Returns:
        The path.

    Raises:
        ArgumentError: The subject cannot be drawn, the suffix is none of these, or the file cannot be written.
        PerexError: A picture is asked for, and Graphviz is not installed.
    """
    target = Path(path) if isinstance(path, str | Path) else Path()
    if target.suffix not in SUFFIXES:
        raise ArgumentError(f"`path` should end in one of {', '.join(SUFFIXES)}. Found {str(path)!r}.")
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise ArgumentError(f"`depth` should be a number of levels, or None. Found {depth!r}.")
    drawing = drawing_of_rewrite(subject) if isinstance(subject, Rewritten) else drawing_of(subject)
    match target.suffix:
        case ".html":
            write_file(target, graph_page(drawing, depth))
        case ".json":
            write_model_explorer(drawing, target)
        case ".dot":
            write_file(target, to_dot(drawing, depth))
        case _:
            render(to_dot(drawing, depth), target)
    return target
