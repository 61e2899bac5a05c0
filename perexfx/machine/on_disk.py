"""Machine profiles on disk: what `perexfx calibrate` measured, and what `cost_model="measured"` remembers.

Promises: a profile belongs to one machine, torch version and number of threads, and is never used for another; a file
that cannot be read counts as none, and says so once. `PEREXFX_CACHE` names another folder than the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from perexfx import kernels
from perexfx.ir.cost_model import BUILT_IN, Machine

_logger = logging.getLogger("perexfx")


def current() -> Machine:
    """The profile of this machine, where it was calibrated; else the built-in one."""
    return _read_profile(str(folder()), identity())


def save(machine: Machine) -> Path:
    """Keeps a profile for this machine. Returns: the file."""
    path = _write("profile", machine.to_dict())
    _read_profile.cache_clear()
    return path


def load_measurements() -> dict[tuple[str, str], float]:
    """(device, dtype and size, strategy) -> seconds, as measured on this machine before."""
    found = _read(folder() / f"measurements-{identity()}.json") or {}
    return {(size, name): seconds for size, by_name in found.items() for name, seconds in by_name.items()}


def save_measurements(known: Mapping[tuple[str, str], float]) -> None:
    """Remembers measurements on this machine."""
    by_size: dict[str, dict[str, float]] = {}
    for (size, name), seconds in known.items():
        by_size.setdefault(size, {})[name] = seconds
    _write("measurements", by_size)


def folder() -> Path:
    """Where profiles are kept."""
    if given := os.environ.get("PEREXFX_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "perexfx"


def identity() -> str:
    """Of this machine, torch version, number of threads and kernels, in a file's name."""
    machine = hashlib.sha256(f"{platform.node()} {processor()}".encode()).hexdigest()[:12]
    return f"{machine}-torch{torch.__version__}-{torch.get_num_threads()}threads-{kernels.level()}"


@cache
def processor() -> str:
    """The processor's name."""
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


@cache
def _read_profile(where: str, of: str) -> Machine:
    found = _read(Path(where) / f"profile-{of}.json")
    if found is None:
        return BUILT_IN
    try:
        return Machine.from_dict(found)
    except (KeyError, TypeError, ValueError) as error:
        _logger.warning("The profile in %s is not one that this version can read (%r): calibrate again.", where, error)
        return BUILT_IN


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be read (%s) and counts as empty.", path, error)
        return None


def _write(kind: str, content: Mapping[str, Any]) -> Path:
    path = folder() / f"{kind}-{identity()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
    return path
