"""Profiles are kept and read back."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import perexfx
from perexfx.ir.cost_model import BUILT_IN, Machine, Rate
from perexfx.machine import on_disk

SLOW = Machine(
    "slow", {kind: Rate(r.flop_rate / 7, r.byte_rate / 7, r.per_call * 7) for kind, r in BUILT_IN.rates.items()}
)


def test_a_profile_is_kept_for_this_machine_and_number_of_threads() -> None:
    assert on_disk.current() is BUILT_IN
    path = on_disk.save(SLOW)
    assert on_disk.current() == SLOW
    gm = perexfx.transform(nn.Linear(3, 2), torch.randn(4, 3))
    assert gm.perexfx.plan is not None
    assert gm.perexfx.plan.machine == "slow"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert on_disk.current() is BUILT_IN
    finally:
        torch.set_num_threads(threads)
    assert str(threads) in path.name
    assert torch.__version__ in path.name


@pytest.mark.parametrize("content", ["", "{", json.dumps({"name": "old", "rates": {}}), json.dumps([1])])
def test_a_broken_profile_counts_as_none_and_says_so(
    content: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = on_disk.save(SLOW)
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "perexfx"):
        assert on_disk.current() is BUILT_IN
    assert str(cache) in caplog.text


def test_a_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PEREXFX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert on_disk.folder() == tmp_path / "perexfx"
