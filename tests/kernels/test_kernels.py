"""Loading the kernels in C++, and what runs where there are none."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx import kernels
from perexfx.kernels import loading
from tests.support.kernels import LEVELS
from tests.support.losses import squares
from tests.support.marks import needs_kernels
from tests.support.oracle import Batch, assert_close, train_step


@needs_kernels
def test_the_best_is_taken() -> None:
    assert kernels.level() == {"AVX512": "avx512", "AVX2": "avx2"}[torch.backends.cpu.get_cpu_capability()]


class SmallNet(nn.Module):
    """Convolutions, a group norm and a strided shortcut, small enough for every strategy."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.second = nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().flatten(1))


def without_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    """As where they are not wanted, were not built, or cannot be used."""
    if how == "not wanted":
        monkeypatch.setenv("PEREXFX_KERNELS", "0")
        return
    for path in loading.FOLDER.iterdir():
        if path.suffix in {"of other sources": (".cpp", ".h", ".kernels")}.get(how, (".cpp", ".h")):
            shutil.copy(path, tmp_path)
    if how == "of other sources":
        with (tmp_path / "gram.cpp").open("a") as file:
            file.write("// changed\n")
    if how == "no library":
        for name in LEVELS:
            (tmp_path / f"{name}.kernels").write_text("not a library")
    monkeypatch.setattr(loading, "FOLDER", tmp_path)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("not wanted", ""),
        ("not built", "were not built"),
        ("no library", "cannot be used"),
        pytest.param("of other sources", "Install the package again", marks=needs_kernels),
    ],
)
def test_without_kernels(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = SmallNet()
    batch = Batch((torch.randn(5, 3, 8, 8),), torch.randn(5))
    expected = train_step(perexfx.transform(model), batch, squares)
    without_kernels(monkeypatch, tmp_path, how)
    loading.loaded.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "perexfx"):
            gm = perexfx.transform(model)
            found = train_step(gm, batch, squares)
            train_step(gm, batch, squares)
        assert kernels.level() == "none"
    finally:
        monkeypatch.undo()
        loading.loaded.cache_clear()
    assert gm.perexfx.plan["first"] != "direct"
    assert_close(found, expected, 1e-5, "gradients")
    messages = {record.message for record in caplog.records if "kernels" in record.message}
    assert all(said in message for message in messages)
    assert bool(messages) is bool(said)


def test_a_strategy_without_its_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    with pytest.raises(perexfx.PerexError, match="no kernel in C\\+\\+"):
        perexfx.transform(SmallNet(), torch.randn(2, 3, 8, 8), strategy={"first": "direct"})


@needs_kernels
def test_a_traced_step_has_torch_operations_in_place_of_kernels() -> None:
    torch.manual_seed(0)
    model = SmallNet()
    x, y = torch.randn(5, 3, 8, 8), torch.randn(5)
    gm = perexfx.transform(model, strategy={"first": "direct", "second": "direct"})
    expected = train_step(gm, Batch((x,), y), squares)
    graph = perexfx.step_graph(gm, squares, x, y)
    _, _, found = graph(dict(gm.named_parameters()), dict(gm.named_buffers()), x, y)
    assert_close(found, expected, 1e-5, "gradients")
