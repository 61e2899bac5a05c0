"""Takes the pictures of the tutorial: pages in headless Chromium, which must be installed.

Run it with `python docs/make_pictures.py`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from torch import nn

import perexfx
from perexfx.bench.models import ResNet18

PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    """Takes all of them."""
    torch.manual_seed(0)
    gm = perexfx.transform(ResNet18(), torch.zeros(32, 3, 32, 32))
    perexfx.verify(gm)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        at = Path(folder)
        perexfx.report(gm).to_html(at / "report.html")
        _take(page, at / "report.html", "report.png")
        perexfx.report(gm, batch_sizes=[1, 2, 4, 8, 16, 32, 64, 128]).to_html(at / "sweep.html")
        _take(page, at / "sweep.html", "sweep.png")
        perexfx.visualize(gm, at / "graph.html")
        _open(page, at / "graph.html")
        page.fill("#search", "blocks.4.conv1")
        page.press("#search", "Enter")
        page.keyboard.press("Escape")
        _shoot(page, "graph.png")
        _open(page, at / "graph.html")
        page.click("#colors [data-mode=seconds]")
        _shoot(page, "heat.png")
        try:
            perexfx.transform(refused(), torch.zeros(4, 3, 8, 8))
        except perexfx.RefusedError as error:
            _open(page, perexfx.visualize(error, at / "refused.html"))
            _shoot(page, "refused.png")
        browser.close()


def refused() -> nn.Module:
    """A model with batch statistics in two of its blocks."""
    blocks = [
        nn.Sequential(nn.Conv2d(3 if at == 0 else 8, 8, 3), nn.BatchNorm2d(8) if at else nn.GroupNorm(2, 8), nn.ReLU())
        for at in range(3)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 10))


def _open(page: Page, path: Path) -> None:
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready]")


def _take(page: Page, path: Path, name: str) -> None:
    page.goto(path.as_uri())
    _shoot(page, name)


def _shoot(page: Page, name: str) -> None:
    page.wait_for_timeout(300)  # what is moved is painted a frame later
    page.screenshot(path=PICTURES / name)


if __name__ == "__main__":
    main()
