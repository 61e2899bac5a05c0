"""Lines of users' code: where a forward is, or where it failed.

Promises: the innermost line that is neither torch's nor ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def line_of(error: BaseException) -> str:
    """` at file.py:line`: the innermost line of an error that is neither torch's nor ours."""
    line, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith(LIBRARIES) and not name.startswith("<"):
            line = f" at {Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def reason_of(error: BaseException) -> str:
    """The first line of an error, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def user_frame() -> tuple[str, int] | None:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        is_console_script = "." not in Path(name).name  # that of `perexfx` itself
        if not name.startswith(LIBRARIES) and not name.startswith("<") and not is_console_script:
            return name, frame.f_lineno
        frame = frame.f_back
    return None


def user_line() -> str:
    """`file.py:line` of that frame."""
    found = user_frame()
    return f"{Path(found[0]).name}:{found[1]}" if found else ""
