"""A cache folder of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("PEREXFX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
