"""Programs that some tests need: where one is missing they are skipped, but in CI, which installs them, they fail."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str) -> str:
    """Path of a program. `PEREXFX_TESTS_NEED` names those that must be there."""
    found = shutil.which(name)
    if found is not None:
        return found
    if name in os.environ.get("PEREXFX_TESTS_NEED", "").split():
        pytest.fail(f"{name} is not installed, and PEREXFX_TESTS_NEED asks for it")
    pytest.skip(f"{name} is not installed; `.ci/run` installs it")
