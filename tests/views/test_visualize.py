"""Drawings show the whole graph, the same in every format, and refused models with their culprits."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.bench.models import LanguageModel, ResNet18, small_cnn
from perexfx.ir.node import info_of
from perexfx.ir.strategy import REWEIGHT
from perexfx.runtime.face import runtime_of
from perexfx.strategies import STRATEGIES
from perexfx.views import palette
from perexfx.views.dot import SHOWN, to_dot
from perexfx.views.drawing import CLIP, Drawing, drawing_of
from tests.support.cases import CASES, Case
from tests.support.models import ResNet50
from tests.support.needed import program


def cnn() -> Any:
    torch.manual_seed(0)
    return perexfx.transform(small_cnn(), torch.zeros(16, 1, 28, 28))


def resnet() -> Any:
    return perexfx.transform(ResNet18(width=8), torch.zeros(4, 3, 32, 32))


class Mixes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def refused(*inputs: Tensor) -> perexfx.RefusedError:
    with pytest.raises(perexfx.MixingError) as caught:
        perexfx.transform(Mixes(), *inputs)
    return caught.value


# What is drawn


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_of_a_graph_is_lost(case: Case) -> None:
    gm = perexfx.transform(case.build(), case.batch().inputs, batch_dim=case.batch_dim)
    drawing = drawing_of(gm)
    captured = [node for node in runtime_of(gm).captured.graph.nodes if node.op != "get_attr"]
    assert [node.id for node in drawing.before.nodes] == [node.name for node in captured]
    assert {(edge.source, edge.target) for edge in drawing.before.edges} == {
        (read.name, node.name) for node in captured for read in node.all_input_nodes if read.op != "get_attr"
    }
    assert drawing.after is not None
    after = {node.id: node for node in drawing.after.nodes}
    assert len(after) == len(drawing.after.nodes)
    assert {node.id for node in drawing.before.nodes} <= after.keys()
    sites = {site.node: site.name for site in gm.perexfx.sites}
    assert {name: node.site for name, node in after.items() if node.role == "site"} == sites
    assert sorted(node.site for node in after.values() if node.role == "norm") == sorted(runtime_of(gm).sites.groups)
    assert len([node for node in after.values() if node.role == "clip"]) == 1
    added = {node.name for node in gm.graph.nodes if info_of(node).role == "format"}
    assert {name for name, node in after.items() if node.role == "format"} == added
    assert all(edge.source in after and edge.target in after for edge in drawing.after.edges)
    assert to_dot(drawing) == to_dot(drawing_of(gm))


def test_every_site_gets_its_parameters_from_the_clip_node() -> None:
    drawing = drawing_of(resnet())
    assert drawing.after is not None
    edges = {(edge.source, edge.target) for edge in drawing.after.edges if edge.kind == "clip"}
    norms = {node.id: node.site for node in drawing.after.nodes if node.role == "norm"}
    sites = {node.id: node.site for node in drawing.after.nodes if node.role == "site"}
    assert {norms[end] for start, end in edges if start == CLIP} == set(sites.values())
    assert {norms[start]: sites[end] for start, end in edges if start != CLIP} == {s: s for s in sites.values()}


def test_modules_that_are_boxes() -> None:
    drawing = drawing_of(resnet())
    assert drawing.boxes["blocks.2"] == "BasicBlock"
    assert drawing.boxes["blocks.2.shortcut"] == "Sequential"
    assert not {"blocks.2.conv1", "blocks.2.relu", "stem.0"} & drawing.boxes.keys()  # one node each
    nodes = {node.site: node for node in drawing.before.nodes if node.site}
    assert nodes["blocks.2.shortcut.0"].modules == ("blocks", "blocks.2", "blocks.2.shortcut")
    assert nodes["blocks.2.shortcut.0"].module == "blocks.2.shortcut.0"
    assert nodes["stem.0"].shape == "[4, 8, 32, 32]"


def test_without_a_plan() -> None:
    drawing = drawing_of(perexfx.transform(small_cnn()))
    assert drawing.subtitle == "4 sites, not planned yet, flat clipping, clip_norm 1"
    assert drawing.rows == ()
    assert drawing.after is not None
    assert {node.site for node in drawing.after.nodes if node.role == "site"} == {"0", "3", "7", "9"}
    assert "digraph" in to_dot(drawing)


def test_sizes_are_told_apart() -> None:
    drawing = drawing_of(perexfx.transform(LanguageModel(20, 8, 1, 2, 6), torch.zeros(2, 6, dtype=torch.long)))
    numbers = {node.id for node in drawing.before.nodes if node.role == "number"}
    assert {"getattr_1", "getitem", "floordiv"} <= numbers
    assert not {"unbind", "reshape", "embedding"} & numbers


def test_what_the_output_does_not_depend_on() -> None:
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            (x * 2).exp()
            return self.layer(x)

    drawing = drawing_of(perexfx.transform(Wasteful(), torch.zeros(4, 3)))
    assert {node.id for node in drawing.before.nodes if node.role == "unused"} == {"mask_1", "mul", "exp"}
    assert "exp" not in to_dot(drawing)


# Formats


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    for suffix in ("html", "dot", "json"):
        first = perexfx.visualize(resnet(), tmp_path / f"first.{suffix}")
        second = perexfx.visualize(resnet(), str(tmp_path / f"second.{suffix}"))
        assert first == tmp_path / f"first.{suffix}"
        assert first.read_text() == second.read_text()


def test_svg_and_png(tmp_path: Path) -> None:
    program("dot")
    gm = cnn()
    root = ET.parse(perexfx.visualize(gm, tmp_path / "graph.svg")).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    nodes = {
        group.findtext(f"{svg}title"): " ".join(text.text or "" for text in group.iter(f"{svg}text"))
        for group in root.iter(f"{svg}g")
        if group.get("class") == "node"
    }
    drawing = drawing_of(gm)
    assert drawing.after is not None
    assert nodes.keys() == {f"before/{n.id}" for n in drawing.before.nodes} | {
        f"after/{n.id}" for n in drawing.after.nodes
    }
    for row in perexfx.report(gm).rows:
        (site,) = [site for site in gm.perexfx.sites if site.name == row.site]
        words = nodes[f"after/{site.node}"].replace("\xa0", " ").split()
        assert words == [site.node.split("_")[0], row.site, row.strategy, f"{row.seconds * 1e3:.2f}", "ms"]
    picture = perexfx.visualize(gm, tmp_path / "graph.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def shown(drawing: Drawing, depth: int | None) -> set[str]:
    found = re.findall(r'^ +"after/(\S+)" \[label', to_dot(drawing, depth), flags=re.MULTILINE)
    return set(found)


def test_folding() -> None:
    drawing = drawing_of(resnet())
    assert shown(drawing, 0) >= {"/stem", "/blocks"}
    assert {f"/blocks.{at}" for at in range(8)} <= shown(drawing, 1)
    assert "/blocks.2.shortcut" in shown(drawing, 2)
    assert not any(name.startswith("/") for name in shown(drawing, 3))
    assert shown(drawing, None) == shown(drawing, 1)
    assert len(shown(drawing, None)) <= SHOWN < len(shown(drawing, 2))
    folded = next(line for line in to_dot(drawing, 1).splitlines() if '"after//blocks.2" [label' in line)
    assert 'label="blocks.2 (BasicBlock)\\n6 sites, ' in folded


def test_whatever_a_name_holds_is_valid_dot() -> None:
    dot = program("dot")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"<c> & d": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))})

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["<c> & d"](x)

    text = to_dot(drawing_of(perexfx.transform(Odd(), torch.zeros(2, 3))), 0)
    drawn = subprocess.run([dot, "-Tsvg"], input=text, capture_output=True, text=True, check=True)
    assert "warning" not in drawn.stderr.lower()
    assert "parts.<c> & d (Sequential)" in unescape(drawn.stdout).replace("\xa0", " ")


def test_for_model_explorer(tmp_path: Path) -> None:
    gm = resnet()
    perexfx.visualize(gm, tmp_path / "graph.json")
    collection = json.loads((tmp_path / "graph.json").read_text())
    assert [graph["id"] for graph in collection["graphs"]] == ["after", "before"]
    for graph in collection["graphs"]:
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"])
        for node in nodes.values():
            assert {"id", "label", "namespace"} <= node.keys()
            assert all(isinstance(a["key"], str) and isinstance(a["value"], str) for a in node["attrs"])
            for at, edge in enumerate(node["incomingEdges"]):
                assert edge["sourceNodeId"] in nodes
                assert edge["targetNodeInputId"] == str(at)
    after = {node["id"]: node for node in collection["graphs"][0]["nodes"]}
    rows = {row.site: row for row in perexfx.report(gm).rows}
    values = {
        "strategy": lambda row: row.strategy,
        "seconds": lambda row: row.seconds,
        "bytes": lambda row: row.bytes_held,
    }
    for name, value in values.items():
        data = json.loads((tmp_path / f"graph.{name}.json").read_text())
        found = {key: result["value"] for key, result in data["after"]["results"].items()}
        assert found == {site.node: value(rows[site.name]) for site in gm.perexfx.sites}
    (conv,) = [site.node for site in gm.perexfx.sites if site.name == "blocks.2.conv1"]
    attributes = {a["key"]: a["value"] for a in after[conv]["attrs"]}
    assert after[conv]["namespace"] == "blocks/blocks.2"
    assert attributes["strategy"] == rows["blocks.2.conv1"].strategy
    assert attributes["parameters"] == "blocks.2.conv1.weight"


def test_page_needs_no_network_and_stays_small(tmp_path: Path) -> None:
    gm = perexfx.transform(ResNet50(), torch.zeros(2, 3, 64, 64))
    page = perexfx.visualize(gm, tmp_path / "graph.html").read_text()
    assert len(page.encode()) < 5_000_000
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page)
    assert "@import" not in page
    assert "url(" not in page.split("<script>")[0]


def test_names_cannot_end_the_script(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"</script><b>": nn.Linear(3, 2)})

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["</script><b>"](x)

    page = perexfx.visualize(perexfx.transform(Odd(), torch.zeros(2, 3)), tmp_path / "graph.html").read_text()
    assert "</script><b>" not in page
    text = page.split('id="data">')[1].split("</script>")[0]
    assert "parts.</script><b>" in json.loads(text)["rows"]


# Refused models


def test_a_refused_model_is_drawn_with_its_culprits(tmp_path: Path) -> None:
    for inputs in ((), (torch.zeros(2, 3, 8, 8),)):
        error = refused(*inputs)
        drawing = drawing_of(error)
        assert drawing.title == "Mixes"
        assert drawing.subtitle == "refused: 1 reason"
        assert drawing.after is None
        (culprit,) = [node for node in drawing.before.nodes if node.role == "culprit"]
        assert culprit.id == "batch_norm"
        assert culprit.refusal == str(error)
        for suffix in ("html", "dot", "json"):
            text = perexfx.visualize(error, tmp_path / f"graph.{suffix}").read_text()
            assert "BatchNorm in training mode" in text or suffix == "dot"
        assert "batch_norm\\nrefused" in to_dot(drawing)


def test_what_is_refused_at_the_first_batch_is_drawn_too() -> None:
    class Centered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h - h.mean(0)

    gm = perexfx.transform(Centered())
    with pytest.raises(perexfx.MixingError) as caught:
        gm(torch.zeros(4, 3))
    assert [node.id for node in drawing_of(caught.value).before.nodes if node.role == "culprit"] == ["mean"]


def test_an_error_without_a_graph(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(refused()))
    with pytest.raises(perexfx.ArgumentError, match=r"This MixingError has no graph to draw"):
        perexfx.visualize(error, tmp_path / "graph.html")
    with pytest.raises(perexfx.ArgumentError, match=r"A ValueError has no graph to draw"):
        perexfx.visualize(ValueError("no"), tmp_path / "graph.html")


def test_a_strategy_that_does_not_apply_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(perexfx.StrategyError) as caught:
        perexfx.transform(small_cnn(), torch.zeros(4, 1, 28, 28), strategy={"0": "outer"})
    assert [node.id for node in drawing_of(caught.value).before.nodes if node.role == "culprit"] == ["conv2d"]


@pytest.mark.parametrize("name", ["norm", "clip", "token", "tape", "enter", "leave"])
def test_nodes_of_the_model_keep_their_names(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.add_module(name, nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, name)(self.layer(x)).clip(-1, 1) + self.layer(x).norm(dim=-1, keepdim=True)

    drawing = drawing_of(perexfx.transform(Named(), torch.zeros(4, 3)))
    assert drawing.after is not None
    assert {node.id for node in drawing.before.nodes} <= {node.id for node in drawing.after.nodes}
    assert [node.id for node in drawing.after.nodes if node.role == "clip"] == [CLIP]


# Mistakes


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = cnn()
    with pytest.raises(perexfx.ArgumentError, match=r"`path` should end in one of .html, .dot, .svg, .png, .json"):
        perexfx.visualize(gm, tmp_path / "graph.pdf")
    with pytest.raises(perexfx.ArgumentError, match=r"`depth` should be a number of levels, or None. Found -1"):
        perexfx.visualize(gm, tmp_path / "graph.dot", depth=-1)
    with pytest.raises(perexfx.ArgumentError, match=r"should come from `perexfx.transform`. Found Linear"):
        perexfx.visualize(nn.Linear(3, 2), tmp_path / "graph.dot")
    for suffix in ("html", "dot", "json"):
        with pytest.raises(perexfx.ArgumentError, match="`path` should be a file that can be written"):
            perexfx.visualize(gm, tmp_path / "nowhere" / f"graph.{suffix}")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(perexfx.PerexError, match=r".png needs Graphviz, whose program `dot` was not found. Install it"):
        perexfx.visualize(gm, tmp_path / "graph.png")


def test_every_strategy_has_a_colour_of_its_own() -> None:
    assert set(palette.STRATEGIES) == {strategy.name for strategy in STRATEGIES} | {REWEIGHT}
    assert len(set(palette.STRATEGIES.values())) == len(STRATEGIES) + 1
