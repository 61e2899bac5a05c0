"""What README and docs show runs, in order, in one namespace each, and what they say is printed is printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.support.marks import needs_kernels

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))


def run(path: Path) -> None:
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        exec(compile(block, str(path), "exec"), namespace)


def test_readme_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    run(README)
    printed = capsys.readouterr().out
    assert "BatchNorm in training mode" in printed
    assert "perexfx strategy report: 3 sites, batch of 32" in printed


@needs_kernels  # other strategies would be printed
@pytest.mark.parametrize("name", ["tutorial.md", "extending.md"])
def test_docs_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(ROOT / "docs" / name)
    printed = capsys.readouterr().out.splitlines()
    for block in re.findall(r"```text\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL):
        assert [line for line in block.splitlines() if line != "..." and line not in printed] == []


def test_the_reference_is_that_of_the_docstrings() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    assert script["reference"]() == (ROOT / "docs" / "reference.md").read_text()


def test_the_picture_of_the_floors_is_that_of_their_data() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "floors.py"))
    assert script["picture"]() == script["PICTURE"].read_text()


def test_links_lead_somewhere() -> None:
    for page in (README, *DOCS):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)
