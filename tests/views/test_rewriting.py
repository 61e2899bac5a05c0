"""What is shown of rewrites: reports, pictures, tables of weaknesses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import perexfx
from perexfx.rewrites import Rewritten
from perexfx.views.heat_maps import heat_maps_of
from perexfx.views.rewriting import RewriteReport
from perexfx.views.rewritten_drawing import drawing_of_rewrite
from tests.support.cases_maps import OddNet, UNet


@pytest.fixture
def reduced() -> Rewritten:
    return perexfx.downsample(OddNet(), torch.randn(8, 3, 45, 37))


@pytest.fixture
def guided() -> Rewritten:
    torch.manual_seed(0)
    columns = [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(3)]
    model = perexfx.parallel_columns(columns, merge="sum")
    x, y = torch.randn(16, 6), torch.arange(16) % 4
    g = perexfx.guide_logits(model, x, num_classes=4)
    for _ in range(2):
        F.cross_entropy(g(x, targets=y), y)
    return g


def test_a_report_has_a_line_for_each_change_and_a_prediction(reduced: Rewritten) -> None:
    found = perexfx.report(reduced)
    assert isinstance(found, RewriteReport)
    assert [row.node for row in found.rows] == [change.place.node for change in reduced.rewriting.changes]
    text = str(found)
    assert text.startswith("perexfx.downsample: 12 changes\nImages at half the resolution, kernels by 'side'; 7 sides")
    assert "4 x 4, sums of taps on 23 x 19" in text
    assert found.ratio is not None
    assert f"r = {found.ratio:.2f}" in text
    assert json.loads(found.to_json())["schema"] == "perexfx.rewrite/1"
    page = found.to_html()
    assert "What became of each node" in page
    assert "sums of taps on 23 x 19" in page
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    assert "stem" in console.export_text()


def test_large_images_are_predicted_to_take_less() -> None:
    """The wider and larger the images, the nearer a fourth of pixels and less than half of taps."""
    ratios = []
    for channels in (4, 64):
        model = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )
        found = perexfx.report(perexfx.downsample(model, torch.randn(8, 3, 64, 64)))
        assert found.ratio is not None
        ratios.append(found.ratio)
    assert ratios[1] < 0.35
    assert ratios[1] < ratios[0]


def test_a_drawing_marks_what_changed(reduced: Rewritten) -> None:
    drawing = drawing_of_rewrite(reduced)
    assert drawing.after is not None
    before = {node.id: node for node in drawing.before.nodes}
    after = {node.id: node for node in drawing.after.nodes}
    assert after["conv2d"].role == "rewritten"
    assert after["conv2d"].note == "conv2d 7 x 7 on 45 x 37 -> 4 x 4, sums of taps on 23 x 19"
    assert after["conv2d_at_side"].note == "added by the rewrite"
    assert after["relu"].role == "model"
    assert before["conv2d"].shape == "[8, 8, 23, 19]"
    assert after["conv2d"].shape == "[8, 8, 12, 10]"
    assert {"x", "output"} <= before.keys() & after.keys()


@pytest.mark.parametrize("suffix", [".html", ".dot", ".json"])
def test_every_format_draws_it(suffix: str, tmp_path: Path, guided: Rewritten) -> None:
    reduced = perexfx.downsample(UNet(), torch.randn(2, 3, 10, 10))
    for name, module in (("reduced", reduced), ("guided", guided)):
        path = perexfx.visualize(module, tmp_path / f"{name}{suffix}")
        text = path.read_text()
        assert ("pooled_kernel" if name == "reduced" else "Guide") in text
    if suffix != ".json":
        assert "Compare down a column" in text


def test_a_heat_map_is_the_table(guided: Rewritten) -> None:
    (heat,) = heat_maps_of(guided)
    table = guided.guide.weakness
    assert isinstance(table, torch.Tensor)
    assert bool((table > 0).all())
    torch.testing.assert_close(torch.tensor(heat.values), table)
    most = heat.values.index(max(heat.values, key=max))
    at = heat.values[most].index(max(heat.values[most]))
    assert heat.colors[most][at] == "#f28b75"
    text = str(perexfx.report(guided))
    assert "weakness of `guide`, pathway by class: mean cross-entropy, in nats" in text
    assert f"{heat.values[most][at]:.2f}" in text
    assert "Compare down a column" in text
    page = perexfx.report(guided).to_html()
    assert "background:#f28b75" in page


def test_it_is_shown_of_a_transformed_model_too(tmp_path: Path) -> None:
    columns = [nn.Linear(6, 4) for _ in range(2)]
    g = perexfx.guide_logits(perexfx.parallel_columns(columns, merge="sum"), num_classes=4, table_from="given")
    gm = perexfx.transform(g, torch.randn(3, 6))
    assert "Compare down a column" in perexfx.visualize(gm, tmp_path / "graph.html").read_text()


def test_many_classes_fit(tmp_path: Path) -> None:
    columns = [nn.Linear(6, 40) for _ in range(2)]
    g = perexfx.guide_logits(perexfx.parallel_columns(columns, merge="sum"), torch.randn(3, 6), num_classes=40)
    assert "and 28 more columns" in str(perexfx.report(g))
    assert "40 columns: see the page or the report" in perexfx.visualize(g, tmp_path / "graph.dot").read_text()


def test_both_rewrites_export_to_onnx(tmp_path: Path) -> None:
    """Checked, and run by onnxruntime, as a file is written; a reduced model in evaluation, where nothing is drawn."""
    x = torch.randn(2, 3, 10, 10)
    gm = perexfx.transform(perexfx.downsample(UNet(), x), x)
    with pytest.raises(perexfx.ExportError, match="random"):
        perexfx.export_onnx(gm, tmp_path / "reduced.onnx", x)
    assert perexfx.export_onnx(gm.eval(), tmp_path / "reduced.onnx", x).exists()
    columns = [nn.Linear(6, 4) for _ in range(2)]
    g = perexfx.guide_logits(perexfx.parallel_columns(columns, merge="sum"), num_classes=4, table_from="given")
    x, y = torch.randn(3, 6), torch.tensor([0, 2, 1])
    g.guide.update([column(x) for column in columns], y)  # pyright: ignore[reportCallIssue]
    gm = perexfx.transform(g, x)
    for graph, given in (("forward", {}), ("step", {"loss_fn": F.cross_entropy, "targets": y})):
        assert perexfx.export_onnx(gm, tmp_path / f"{graph}.onnx", x, graph=graph, **given).exists()
