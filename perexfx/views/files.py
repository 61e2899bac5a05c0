"""Files that users name: written whole, or a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from perexfx.ir.errors import ArgumentError


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Writes a file; text as UTF-8. Returns: its path.

    Raises:
        ArgumentError: It cannot be written.
    """
    found = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        found.write_bytes(data)
    return found


def make_folder(path: str | Path) -> None:
    """A folder, and those above it, where there is none.

    Raises:
        ArgumentError: It cannot be made.
    """
    with writing(path, "folder"):
        Path(path).mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(path: str | Path, what: str = "file") -> Iterator[None]:
    """Raises ArgumentError for what goes wrong with a path in its body: no folder, no right, no such name."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):  # in the name
            raise
        shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"`path` should be a {what} that can be written. Found {shown!r}: {reason}.") from None


__all__ = ["make_folder", "write_file", "writing"]
