"""Every library of kernels in turn, what ran of it, and on how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL

import pytest
import torch

from perexfx import kernels
from perexfx.kernels import loading
from tests.support.kernels import LEVELS


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CDLL:
    """Every library that this processor can run, in turn."""
    if torch.backends.cpu.get_cpu_capability() not in LEVELS[request.param]:
        pytest.skip("this processor has no such vectors")
    path = loading.FOLDER / f"{request.param}.kernels"
    if not path.exists():
        pytest.skip("kernels are built where there is a compiler with OpenMP")
    library = loading.load(path)
    assert library is not None
    monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: library)
    return library


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    ran: list[str] = []
    for name in kernels.__all__:
        original = getattr(kernels, name)
        if not callable(original) or name in ("are_built", "are_for", "for_sizes", "level"):
            continue

        def run(*args: object, original=original, name=name) -> object:
            found = original(*args)
            if found is not None:
                ran.append(name)
            return found

        monkeypatch.setattr(kernels, name, run)
    monkeypatch.setattr("perexfx.layers.lstm.lstm_steps_back", kernels.lstm_steps_back)
    return ran


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
