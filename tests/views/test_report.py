"""The report is a deterministic table with a line per site."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import jsonschema
import pytest
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup
from rich.console import Console
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import ResNet18, small_cnn
from perexfx.ir.strategy import REWEIGHT
from perexfx.strategies import STRATEGIES
from perexfx.views import decisions
from perexfx.views.words import megabytes
from tests.support.marks import needs_kernels
from tests.support.models import Mixed

GOLDEN = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    """Compares with a golden file; `UPDATE_GOLDEN=1` writes it anew."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text()


@needs_kernels
def test_golden_mixed() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    check("mixed.txt", str(perexfx.report(gm)))


@needs_kernels
def test_golden_resnet_under_a_budget() -> None:
    x = torch.zeros(8, 3, 32, 32)
    gm = perexfx.transform(ResNet18(width=16), x, clip_norm=0.5, clipping="automatic", memory_budget=0)
    perexfx.verify(gm)
    check("resnet_budget.txt", str(perexfx.report(gm)))


@needs_kernels
def test_golden_forced() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long), clip_norm=None, strategy="gram")
    check("forced.txt", str(perexfx.report(gm)))


def test_it_says_the_same_after_the_first_batch() -> None:
    ids = torch.zeros(8, 12, dtype=torch.long)
    gm = perexfx.transform(Mixed())
    gm(ids)
    assert str(perexfx.report(gm)) == str(perexfx.report(perexfx.transform(Mixed(), ids)))


def test_rows_add_up_to_the_plan() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    report, plan = perexfx.report(gm), gm.perexfx.plan
    assert [row.site for row in report.rows] == [site.name for site in gm.perexfx.sites]
    assert sum(row.seconds for row in report.rows) == pytest.approx(plan.seconds)
    assert sum(row.bytes_held for row in report.rows) == sum(d.chosen.bytes_held for d in plan.decisions)


# What every strategy costs, and where the plan would be another


def test_every_strategy_is_listed_at_every_operand() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    names = [*(strategy.name for strategy in STRATEGIES), REWEIGHT]
    for row in perexfx.report(gm).rows:
        for choice in row.choices:
            assert [option.strategy for option in choice.options] == names
            assert [o.strategy for o in choice.options if o.status == "chosen"] == [choice.strategy]
            for option in choice.options:
                is_refused = option.status == "refused"
                assert (option.seconds is None) == (option.bytes_held is None) == is_refused
                assert bool(option.why) == (option.status != "chosen")


def test_explaining_a_site() -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    report = perexfx.report(gm)
    text = report.explain("head")
    assert text.startswith("head: linear, head models.py:")
    assert "weight (head.weight): 32 -> 10\n" in text
    assert "bias (head.bias): [10]\n" in text
    assert re.search(r"gram +rejected +0\.\d+ ms +0\.\d+ MB +\+0\.\d+ ms \(\d\.\d+x\)", text)
    assert "joined with shared#2" in report.explain("shared")
    with pytest.raises(perexfx.ArgumentError, match=r"There is no site 'tail'. The sites are embedding, positions"):
        report.explain("tail")


def test_flips_are_what_other_plans_say() -> None:
    x = torch.zeros(16, 1, 28, 28)
    gm = perexfx.transform(small_cnn(), x)
    report = perexfx.report(gm)
    assert report.flips
    assert report.batch_sizes == (1, 2, 4, 8, 16, 32, 64)
    for n in report.batch_sizes:
        plan = perexfx.transform(small_cnn(), x[:1].expand(n, -1, -1, -1)).perexfx.plan
        found = {f.site: name for f in report.flips for low, high, name in f.ranges if low <= n <= high}
        assert found == {flip.site: plan[flip.site] for flip in report.flips}
        assert all(plan[row.site] == row.strategy for row in report.rows if row.site not in found)


@needs_kernels
def test_smaller_budgets_are_what_other_plans_say() -> None:
    x = torch.zeros(32, 3, 32, 32)
    report = perexfx.report(perexfx.transform(ResNet18(width=32), x))
    assert report.budgets
    added = report.bytes_added
    for step in report.budgets:
        assert step.bytes_added < added
        assert step.seconds >= report.seconds
        added = step.bytes_added
        again = perexfx.report(perexfx.transform(ResNet18(width=32), x, memory_budget=step.memory_budget))
        assert (again.bytes_added, again.seconds) == (step.bytes_added, step.seconds)
        strategies = {row.site: row.strategy for row in again.rows}
        assert all(strategies[site] == strategy for site, strategy in step.changes)


def test_budgets_of_too_many_decisions_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "CHOICES", 2)
    report = perexfx.report(perexfx.transform(small_cnn(), torch.zeros(8, 1, 28, 28)))
    assert report.budgets is None
    words = "Smaller memory budgets were not tried"
    assert words in str(report)
    assert words in report.to_html()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    assert words in console.export_text()


@pytest.mark.parametrize(
    ("count", "words", "signed"),
    [
        (0, "0.00", "+0.00"),
        (64, "<0.001", "+<0.001"),
        (-64, "-<0.001", "-<0.001"),
        (1_500, "0.002", "+0.002"),
        (99_000, "0.099", "+0.099"),
        (-2_345_678, "-2.35", "-2.35"),
        (123_456_789, "123.46", "+123.46"),
    ],
)
def test_megabytes(count: int, words: str, signed: str) -> None:
    assert megabytes(count) == words
    assert megabytes(count, is_signed=True) == signed
    assert re.fullmatch(r"-?(\d+\.\d{3}|<0\.001)", megabytes(count, in_column=True))


@needs_kernels
def test_a_size_that_no_plan_fits() -> None:
    gm = perexfx.transform(ResNet18(width=16), torch.zeros(16, 3, 32, 32), memory_budget=0)
    sweep = perexfx.report(gm, batch_sizes=[16, 512])
    assert [column.fits for column in sweep.columns] == [True, False]
    assert "none fits" in str(sweep)
    report = perexfx.report(gm)
    assert report.unfit == (32, 64)
    assert "no plan fits the memory budget at 32, 64" in str(report)
    assert "No plan fits the memory budget at 32, 64" in report.to_html()


def test_the_plan_across_batch_sizes() -> None:
    gm = perexfx.transform(small_cnn(), torch.zeros(4, 1, 28, 28))
    before = gm.perexfx.plan
    sweep = perexfx.report(gm, batch_sizes=[256, 1, 16])
    assert [column.batch_size for column in sweep.columns] == [256, 1, 16]
    for column in sweep.columns:
        plan = perexfx.transform(small_cnn(), torch.zeros(column.batch_size, 1, 28, 28)).perexfx.plan
        assert column.seconds == plan.seconds
        assert column.ordinary_seconds == plan.ordinary_seconds
        assert column.bytes_added == plan.bytes_added
        assert [site.strategy for site in column.sites] == [plan[site] for site in sweep.sites]
        assert sum(column.seconds_by_strategy.values()) == pytest.approx(plan.seconds)
    assert gm.perexfx.plan is before
    page = BeautifulSoup(sweep.to_html(), "html.parser")
    cells = [[cell.get_text() for cell in row.find_all("td")] for row in page.select(".grid tbody tr")]
    assert [row[0] for row in cells] == [*sweep.sites, "ms", "ms, ordinary", "us per example", "MB more"]
    assert [row[1:] for row in cells[: len(sweep.sites)]] == [
        [column.sites[at].strategy for column in sweep.columns] for at in range(len(sweep.sites))
    ]
    assert json.loads(sweep.to_json())["columns"][1]["batch_size"] == 1
    for wrong in ([], [0], [2.0], [True]):
        with pytest.raises(perexfx.ArgumentError, match=r"`batch_sizes` should be positive numbers. Found"):
            perexfx.report(gm, batch_sizes=wrong)


# Ways to read it


def test_json(tmp_path: Path) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs/schemas/report.schema.json").read_text())
    gm = perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28))
    for prove in (False, True):
        if prove:
            perexfx.verify(gm)
            perexfx.profile(gm, F.cross_entropy, torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.long), steps=1)
        report = perexfx.report(gm)
        text = report.to_json(tmp_path / "report.json")
        assert (tmp_path / "report.json").read_text() == text
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
        assert json.loads(text) == json.loads(json.dumps(report.to_dict()))


def test_page(tmp_path: Path) -> None:
    gm = perexfx.transform(Mixed(), torch.zeros(8, 12, dtype=torch.long))
    report = perexfx.report(gm)
    assert report.to_html(tmp_path / "report.html") == report.to_html()
    page = BeautifulSoup((tmp_path / "report.html").read_text(), "html.parser")
    rows, folded = page.select("tr[data-site]"), page.select("tr.more")
    assert [row["data-site"] for row in rows] == [row.site for row in report.rows]
    for shown, more, row in zip(rows, folded, report.rows, strict=True):
        assert shown.find_next_sibling("tr") is more
        cells = [cell.get_text(" ", strip=True) for cell in shown.find_all("td", recursive=False)]
        assert cells[1:] == list(report.cells(row))[1:]
        options = [[c.get_text(strip=True) for c in line.find_all("td")] for line in more.select(".options tr")]
        expected = [
            [o.strategy, o.status, "" if o.seconds is None else f"{o.seconds * 1e3:.3f}"]
            for choice in row.choices
            for o in choice.options
        ]
        assert [line[:3] for line in options if line] == expected
    assert not page.select("script, link, img")  # nothing from elsewhere
    assert "<html" not in report._repr_html_()
    assert "Strategy report" in report._repr_html_()
    with pytest.raises(perexfx.ArgumentError, match=r"`path` should be a file that can be written. Found '.*nowhere"):
        report.to_html(tmp_path / "nowhere" / "report.html")


def test_names_are_escaped() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"<script>": nn.Linear(3, 2)})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["<script>"](x)

    page = perexfx.report(perexfx.transform(Odd(), torch.zeros(2, 3))).to_html()
    assert "<script>" not in page
    assert "layers.&lt;script&gt;" in page


@pytest.mark.parametrize("width", [30, 40, 80, 100, 200])
def test_what_has_no_room_in_a_terminal(width: int) -> None:
    report = perexfx.report(perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28)))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    headings = next(line.split() for line in text.splitlines() if line.startswith("  site "))
    assert ("no room for" in text) == ("why" not in headings)
    for row in report.rows:  # nothing is cut
        cells = dict(report.labelled(row))
        assert any(line.split()[:1] == [row.site] and f" {row.strategy} " in line for line in text.splitlines())
        assert f" {cells['ms']} " in text


def test_in_a_terminal() -> None:
    gm = perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28))
    perexfx.verify(gm)
    console = Console(width=200, record=True, file=io.StringIO())
    report = perexfx.report(gm)
    console.print(report, perexfx.report(gm, batch_sizes=[1, 64]))
    text = console.export_text()
    for row in report.rows:
        assert re.search(rf"{row.site} +{row.kind} .* {row.strategy} ", text)
    assert "Other batch sizes" in text
    assert "Proved on the dataflow" in text
    assert "plans by batch size" in text


# What was measured


def test_a_profile_is_shown_beside_the_prediction() -> None:
    torch.manual_seed(0)
    model, x, y = small_cnn(), torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,))
    gm = perexfx.transform(model, x)
    F.cross_entropy(gm(x), y).backward()
    norms, random = gm.perexfx.norms, torch.get_rng_state()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    found = perexfx.profile(gm, F.cross_entropy, x, y, steps=3)
    assert [site.name for site in found.sites] == [site.name for site in gm.perexfx.sites]
    assert all(site.seconds > 0 for site in found.sites)
    assert gm.perexfx.norms is norms
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert torch.equal(random, torch.get_rng_state())
    report = perexfx.report(gm)
    assert report.headings[4:8] == ("ms", "MB", "ms measured", "MB measured")
    for row, site in zip(report.rows, found.sites, strict=True):
        assert (row.measured_seconds, row.measured_bytes) == (site.seconds, site.bytes_held)
        assert row.measured_bytes == row.bytes_held
    assert f"measured: {found}" in str(report)
    assert re.match(r"ordinary step \d+\.\d\d ms, clipped \d+\.\d\d ms, ratio \d", str(found))


def test_without_a_plan_or_a_transform() -> None:
    with pytest.raises(perexfx.ArgumentError, match="There is no plan yet"):
        perexfx.report(perexfx.transform(Mixed()))
    with pytest.raises(perexfx.ArgumentError, match=r"should come from `perexfx.transform`. Found Mixed"):
        perexfx.report(Mixed())
