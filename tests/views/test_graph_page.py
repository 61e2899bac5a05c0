"""The page of the graph in a real browser: it folds, finds, selects on both sides, and its panel says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from torch import nn

import perexfx
from perexfx.bench.models import LanguageModel, ResNet18, small_cnn
from perexfx.runtime.face import runtime_of
from perexfx.views.drawing import CLIP, drawing_of
from tests.support.models import ResNet50
from tests.support.needed import program


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = program("chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that reaches no network, and on which an error of a script fails the test."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    yield opened
    opened.close()
    assert not errors


def show(page: Page, subject: Any, path: Path) -> None:
    page.goto(perexfx.visualize(subject, path).as_uri())
    page.wait_for_selector("body[data-ready]")


def resnet() -> Any:
    return perexfx.transform(ResNet18(width=8), torch.zeros(4, 3, 32, 32))


def drawn(page: Page, side: str) -> set[str]:
    """Ids of the nodes and folded modules that are drawn."""
    found = page.eval_on_selector_all(f"#{side} .node", "nodes => nodes.map(node => node.id)")
    return {name.removeprefix(f"{side}|") for name in found}


def chosen(page: Page) -> set[str]:
    return set(page.eval_on_selector_all(".chosen", "nodes => nodes.map(node => node.id)"))


def node(side: str, name: str) -> str:
    return f'[id="{side}|{name}"]'


def is_in_view(page: Page, side: str, name: str) -> bool:
    page.wait_for_timeout(100)  # what is moved is painted a frame later
    box, pane = page.locator(node(side, name)).bounding_box(), page.locator(f"#{side} .canvas").bounding_box()
    assert box is not None
    assert pane is not None
    is_within_height = pane["y"] <= box["y"] + box["height"] / 2 <= pane["y"] + pane["height"]
    return is_within_height and pane["x"] <= box["x"] + box["width"] / 2 <= pane["x"] + pane["width"]


def test_a_small_graph_is_drawn_whole(page: Page, tmp_path: Path) -> None:
    gm = perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28))
    show(page, gm, tmp_path / "graph.html")
    captured = {node.name for node in runtime_of(gm).captured.graph.nodes if node.op != "get_attr"}
    assert drawn(page, "before") == captured
    assert captured | {CLIP, *(f"perexfx_norm{at}" for at in ("", "_1", "_2", "_3"))} <= drawn(page, "after")
    text = page.text_content(node("after", "conv2d")) or ""
    row = perexfx.report(gm).rows[0]
    assert row.strategy in text
    assert f"{row.seconds * 1e3:.2f} ms" in text.replace("\xa0", " ")
    assert page.title() == "Sequential: graph of the rewrites"


def test_folding_and_unfolding(page: Page, tmp_path: Path) -> None:
    show(page, resnet(), tmp_path / "graph.html")
    assert "/blocks.2" in drawn(page, "after")
    assert "conv2d_5" not in drawn(page, "after")
    page.dblclick(node("after", "/blocks.2"))
    assert {"conv2d_5", "/blocks.2.shortcut"} <= drawn(page, "before") & drawn(page, "after")
    assert "/blocks.2" not in drawn(page, "after")
    assert chosen(page) == {"before|/blocks.2", "after|/blocks.2"}  # its boxes
    assert page.inner_text("#panel h3") == "blocks.2"
    page.click("#toggle")
    assert "/blocks.2" in drawn(page, "before") & drawn(page, "after")
    page.click("#unfold-all")
    assert not any(name.startswith("/") for name in drawn(page, "after"))
    page.click("#fold-all")
    assert {"/stem", "/blocks"} <= drawn(page, "after")


def test_searching(page: Page, tmp_path: Path) -> None:
    gm = resnet()
    show(page, gm, tmp_path / "graph.html")
    page.fill("#search", "blocks.6.conv2")
    assert page.inner_text("#found li:first-child").startswith("blocks.6.conv2")
    page.press("#search", "Enter")
    (site,) = [site for site in gm.perexfx.sites if site.name == "blocks.6.conv2"]
    assert chosen(page) == {f"before|{site.node}", f"after|{site.node}"}
    assert is_in_view(page, "before", site.node)
    assert is_in_view(page, "after", site.node)
    page.fill("#search", "no such thing")
    assert page.inner_text("#found") == "nothing found"
    page.fill("#search", "blocks.3")
    page.click("#found li:first-child")
    assert page.inner_text("#panel h3") == "blocks.3"


def test_choosing_shows_the_row_of_the_report(page: Page, tmp_path: Path) -> None:
    gm = perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28))
    show(page, gm, tmp_path / "graph.html")
    row = perexfx.report(gm).row("3")
    page.click(node("before", "conv2d_1"))
    assert chosen(page) == {"before|conv2d_1", "after|conv2d_1"}
    panel = page.inner_text("#panel")
    assert row.shapes in panel
    assert "3.weight, 3.bias" in panel
    options = page.eval_on_selector_all(
        "#panel table:first-of-type tr",
        "rows => rows.map(row => [row.dataset.status, ...[...row.cells].map(cell => cell.innerText)])",
    )
    weight = row.choices[0]
    assert [(status, name) for status, name, *_ in options] == [(o.status, o.strategy) for o in weight.options]
    for (_, _, seconds, why), option in zip(options, weight.options, strict=True):
        assert why == ("chosen" if option.status == "chosen" else option.why)
        assert bool(seconds) == (option.seconds is not None)
    page.click(node("after", "perexfx_norm_1"))
    assert "norm node of 3" in page.inner_text("#panel")
    assert chosen(page) == {"before|conv2d_1", "after|perexfx_norm_1"}
    page.click(node("after", CLIP))
    assert "8 parameters" in page.inner_text("#panel") or "0.weight" in page.inner_text("#panel")
    assert chosen(page) == {f"after|{CLIP}"}


def test_colours(page: Page, tmp_path: Path) -> None:
    gm = perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28))
    show(page, gm, tmp_path / "graph.html")
    rows = {row.site: row for row in perexfx.report(gm).rows}
    sites = {site.node: rows[site.name] for site in gm.perexfx.sites}

    def fill(name: str) -> str:
        return page.locator(node("after", name)).locator("path, polygon").first.get_attribute("fill") or ""

    by_strategy = {name: fill(name) for name in sites}
    for name, row in sites.items():
        swatch = page.locator(f'#legend [data-strategy="{row.strategy}"] i').get_attribute("style")
        assert swatch == f"background:{by_strategy[name]}"
    for mode, attribute in (("seconds", "seconds"), ("bytes", "bytes_held")):
        page.click(f"#colors [data-mode={mode}]")
        darkness = {name: -sum(bytes.fromhex(fill(name)[1:])) for name in sites}
        assert sorted(sites, key=darkness.__getitem__) == sorted(sites, key=lambda n: getattr(sites[n], attribute))
    page.click("#colors [data-mode=strategy]")
    assert {name: fill(name) for name in sites} == by_strategy
    strategy = sites["linear"].strategy
    page.click(f'#legend [data-strategy="{strategy}"]')
    lit = set(page.eval_on_selector_all("#after .lit", "nodes => nodes.map(node => node.id.slice(6))"))
    assert lit >= {name for name, row in sites.items() if row.strategy == strategy}
    assert not lit & {name for name, row in sites.items() if row.strategy != strategy}


def test_clip_edges_and_sizes_are_shown_on_request(page: Page, tmp_path: Path) -> None:
    gm = perexfx.transform(LanguageModel(20, 8, 1, 2, 6), torch.zeros(2, 6, dtype=torch.long))
    show(page, gm, tmp_path / "graph.html")
    page.click("#unfold-all")
    assert "floordiv" not in drawn(page, "before")
    page.check("#everything")
    assert "floordiv" in drawn(page, "before") & drawn(page, "after")
    shown = page.locator("#after .edge").count()
    page.set_checked("#clip-edges", not page.is_checked("#clip-edges"))
    after = drawing_of(gm).after
    assert after is not None
    from_clip = [edge for edge in after.edges if edge.source == CLIP]
    assert len(from_clip) > len(runtime_of(gm).sites.groups)  # a parameter expression reads it too
    assert abs(page.locator("#after .edge").count() - shown) == len(from_clip)


def test_a_refused_model(page: Page, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(perexfx.MixingError) as caught:
        perexfx.transform(model)
    show(page, caught.value, tmp_path / "graph.html")
    assert chosen(page) == {"before|batch_norm"}
    assert str(caught.value) in page.inner_text("#panel")
    assert page.locator("#after").count() == 0
    page.click("#before .canvas", position={"x": 5, "y": 5})
    assert str(caught.value) in page.inner_text("#panel")


def test_large_models_open_fast_and_unfold(page: Page, tmp_path: Path) -> None:
    models = {
        "resnet50": (ResNet50(), torch.zeros(2, 3, 64, 64)),
        "transformer": (LanguageModel(50, 16, 12, 2, 8), torch.zeros(2, 8, dtype=torch.long)),
    }
    for name, (model, x) in models.items():
        gm = perexfx.transform(model, x)
        path = tmp_path / f"{name}.html"
        show(page, gm, path)
        assert path.stat().st_size < 5_000_000
        page.click("#unfold-all")
        assert {site.node for site in gm.perexfx.sites} <= drawn(page, "after")
        last = gm.perexfx.sites[-2]
        page.fill("#search", last.name)
        page.press("#search", "Enter")
        assert chosen(page) == {f"before|{last.node}", f"after|{last.node}"}
        assert is_in_view(page, "after", last.node)


def test_at_two_widths(page: Page, tmp_path: Path) -> None:
    show(page, resnet(), tmp_path / "graph.html")
    for width, height in ((1920, 1000), (1280, 800)):
        page.set_viewport_size({"width": width, "height": height})
        for selector in ("#search", "#unfold-all", "#before svg", "#after svg", "#panel"):
            box = page.locator(selector).bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width + 1
        overflow = page.evaluate("document.documentElement.scrollWidth > innerWidth")
        assert not overflow
