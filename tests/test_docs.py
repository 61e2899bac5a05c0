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
DOCS = sorted((ROOT / "docs").rglob("*.md"))
WINGS = sorted((ROOT / "docs" / "wings").glob("*.md"))
HOW_IT_WORKS = ROOT / "docs" / "how-it-works.md"
RUN = [page for page in DOCS if "```python" in page.read_text() and page.name != "reference.md"]  # that has signatures
PACKAGE = ROOT / "perexfx"


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
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_docs_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(page)
    printed = capsys.readouterr().out.splitlines()
    for block in re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL):
        assert [line for line in block.splitlines() if line != "..." and line not in printed] == []


def test_the_reference_is_that_of_the_docstrings() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    assert script["reference"]() == (ROOT / "docs" / "reference.md").read_text()


def test_the_picture_of_the_floors_is_that_of_their_data() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "floors.py"))
    assert script["picture"]() == script["PICTURE"].read_text()


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        led_to = page.parent / name if name else page
        assert led_to.exists(), target
        assert not anchor or anchor in anchors(led_to), target


@pytest.mark.parametrize("page", [HOW_IT_WORKS, *WINGS], ids=lambda page: page.name)
def test_files_and_functions_that_are_named_are_there(page: Path) -> None:
    named = re.findall(r"`((?:\w+/)+|(?:\w+/)*\w+\.(?:py|cpp))`(?:: ((?:`\w+`(?:, )?)+))?", without_code(page))
    assert named
    for path, names in named:
        if "WING" in path:
            continue
        found = [place / path for place in (ROOT, PACKAGE, PACKAGE / "kernels" / "cpp") if (place / path).exists()]
        assert found, path
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^ *((def|class) )?{name}\b", found[0].read_text(), re.MULTILINE), (path, name)
