"""Exported files are valid, run in onnxruntime, and compute what the module computes: its forward, and its step."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils import _pytree as pytree

import perexfx
from perexfx.bench.models import ResNet18, SequenceClassifier, mlp
from perexfx.runtime.face import runtime_of
from perexfx.views.onnx.decompositions import DECOMPOSITIONS
from perexfx.views.onnx.pooling import BY_SCALE

Loss = Callable[[Any, Any], Tensor]


class Model:
    """A file in onnxruntime."""

    def __init__(self, path: Path) -> None:
        onnx.checker.check_model(str(path), full_check=True)
        self.proto = onnx.load(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options)

    @property
    def inputs(self) -> dict[str, list[Any]]:
        return {given.name: given.shape for given in self.session.get_inputs()}

    @property
    def calls(self) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.domain == "perexfx"]

    def __call__(self, *tensors: Tensor, **named: Tensor) -> dict[str, Tensor]:
        given = {**dict(zip(self.inputs, tensors, strict=False)), **named}
        found = self.session.run(None, {name: value.numpy() for name, value in given.items()})
        return {out.name: torch.as_tensor(v) for out, v in zip(self.session.get_outputs(), found, strict=True)}


def metadata(node: Any) -> dict[str, str]:
    return {prop.key: prop.value for prop in node.metadata_props}


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# The forward


class Attention(nn.Module):
    """A token in front, positions, attention with a mask, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv1d(3, 8, 2, stride=2), nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 4, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.patches(x).transpose(1, 2)
        rows = torch.cat([self.first.expand(x.shape[0], -1, -1), rows], 1) + self.positions
        rows = self.block(rows)
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        return self.head(rows[:, 0])


class Tied(nn.Module):
    """The same weight in an embedding and a linear layer, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.rows.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(self.rows(ids))))).mean(1)


class TimeFirst(nn.Module):
    """Examples on axis 1, a keyword input, a number, and a tuple of results."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, 2, bidirectional=True), nn.Linear(8, 5)

    def forward(self, x: Tensor, shift: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        rows, (hidden, _) = self.lstm(x + shift)
        return self.head(rows) * scale, {"hidden": hidden}


class Dictionary(nn.Module):
    """Takes and returns dicts, one of whose names a parameter has too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        wide = self.layer(image * self.scale * scale)
        return {"logits": wide, "image": image, "again": wide}


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 10)),
    )


class Pooled(nn.Module):
    """Pools with divisors and ceilings, and resizing by a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3)
        self.pools = nn.Sequential(
            nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=4),
            nn.Upsample(scale_factor=1.7, mode="bicubic"),
            nn.Hardshrink(0.1),
            nn.Upsample(scale_factor=0.7, mode="bilinear"),
        )
        self.volumes = nn.Sequential(
            nn.Upsample(scale_factor=1.3, mode="trilinear"), nn.AvgPool3d(2, 1, ceil_mode=True, divisor_override=5)
        )
        self.rows = nn.Sequential(nn.Upsample(scale_factor=1.3, mode="linear"), nn.Softshrink(0.1))
        self.head = nn.LazyLinear(10)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pools(self.first(x))
        rows = self.rows(self.volumes(pooled.unsqueeze(1)).flatten(2))
        return (
            self.head(rows.unfold(2, 3, 2).sum(-1).flatten(1)) + torch.diagonal(pooled, 1, 2, 3).mean((1, 2))[:, None]
        )


def pooled() -> nn.Module:
    model = Pooled()
    model(torch.zeros(1, 2, 11, 12))
    return model


class Masked(nn.Module):
    """Attention with masks; some rows of them see nothing, for which torch has zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 24), nn.Linear(6, 10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value, wide = self.layer(x).chunk(4, -1)
        one = F.scaled_dot_product_attention(query, key, value, mask)
        heads = [t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (query, key, value)]
        shifts = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
        several = F.scaled_dot_product_attention(*heads, attn_mask=shifts[:, None], scale=0.3)
        grouped = F.scaled_dot_product_attention(heads[0], *(t[:, :1] for t in heads[1:]), enable_gqa=True)
        return self.head(one + (several + grouped).transpose(1, 2).flatten(2) + wide).mean(1)


def some_masks(n: int) -> Tensor:
    mask = torch.rand(n, 5, 5) > 0.4
    mask[:, 2] = False
    return mask


FORWARDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (cnn, (2, 10, 10)),
    "resnet": (lambda: ResNet18(width=4), (3, 32, 32)),
    "mlp": (lambda: mlp((6, 5, 10)), (6,)),
    "attention": (Attention, (3, 6)),
    "lstm": (lambda: SequenceClassifier(4, 5), (6, 4)),
    "pooled": (pooled, (2, 11, 12)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = FORWARDS[name]
    gm = perexfx.transform(make(), clip_norm=0.5)
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", torch.randn(3, *shape)))
    assert list(model.inputs.values()) == [["batch", *shape]]
    for n in (3, 1, 5):
        x = torch.randn(n, *shape)
        assert_same(model(x)["output"], gm(x).detach())
    check_structure(model, gm)


def check_structure(model: Model, gm: nn.Module) -> None:
    """Clip node, norm nodes and sites are calls of functions that have bodies; parameters have their names."""
    state: Any = gm.perexfx
    functions = {function.name: function for function in model.proto.functions if function.domain == "perexfx"}
    assert all(function.node for function in functions.values())
    assert {call.op_type for call in model.calls} == functions.keys()
    clip, *others = model.calls
    norms = [call for call in others if call.op_type == "norm"]
    sites = [call for call in others if call.op_type != "norm"]
    assert clip.op_type == "clip"
    assert [call.name for call in sites] == [site.name for site in state.sites]
    assert [metadata(call)["perexfx.group"] for call in norms] == list(runtime_of(gm).sites.groups)
    assert all(call.input[0] == clip.output[0] for call in norms)
    assert all(call.input[0] in {norm.output[0] for norm in norms} for call in sites)
    names = {name for name, _ in (*gm.named_parameters(), *gm.named_buffers())}
    assert {name for name, _ in gm.named_parameters()} <= {value.name for value in model.proto.graph.initializer}
    assert list(clip.input)[1:] == [name for name in clip.input[1:] if name in names]
    read = {name for node in model.proto.graph.node if node is not clip for name in node.input}
    assert not read.intersection(clip.input[1:])


def test_equal_bodies_are_one_function(tmp_path: Path) -> None:
    gm = perexfx.transform(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2, bias=False)))
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", torch.randn(3, 4)))
    assert [call.op_type for call in model.calls if call.op_type.startswith("linear")] == [*["linear"] * 3, "linear_2"]


def test_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, ids = perexfx.transform(Tied()), torch.randint(0, 20, (5, 4))
    model = Model(perexfx.export_onnx(gm, str(tmp_path / "model.onnx"), ids[:3]))
    assert_same(model(ids)["output"], gm(ids).detach())
    assert [value.name for value in model.proto.graph.initializer] == ["layer.weight", "layer.bias", "rows.weight"]
    groups = [metadata(call)["perexfx.group"] for call in model.calls if call.op_type == "norm"]
    assert groups == list(runtime_of(gm).sites.groups)


def test_examples_on_another_axis(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"x": torch.randn(4, 2, 3), "shift": torch.ones(1), "scale": 2.0}
    gm = perexfx.transform(TimeFirst(), given, batch_dim=1)
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", given))
    assert model.inputs == {"x": [4, "batch", 3], "shift": [1]}
    x, shift = torch.randn(4, 5, 3), torch.randn(1)
    expected, last = gm(x, shift, 2.0)
    found = model(x, shift)
    assert_same(found["output.0"], expected.detach())
    assert_same(found["output.1.hidden"], last["hidden"].detach())


def test_names_that_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, image, scale = perexfx.transform(Dictionary()), torch.randn(4, 3), torch.randn(4, 3)
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", {"image": image[:2], "scale": scale[:2]}))
    assert list(model.inputs) == ["image", "scale_"]
    found = model(image, scale)
    expected = gm(image, scale)
    assert list(found) == ["logits", "image_", "again"]
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert_same(one, other.detach())


class Namesakes(nn.Module):
    """Parameters, modules and inputs with the names that a file has for its own values."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.input = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
        self.clipped, self.l = nn.Module(), nn.Linear(4, 4)
        self.clipped.l = nn.Linear(4, 10)

    def forward(self, token: Tensor, targets: Tensor) -> Tensor:
        return self.clipped.l(self.l((token + self.input) @ self.output + targets))


def test_names_of_values_of_the_file_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(Namesakes()), (torch.randn(5, 3), torch.randn(5, 4)), torch.randint(0, 10, (5,))
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", x))
    assert list(model.inputs) == ["token", "targets"]
    assert_same(model(*x)["output_"], gm(*x).detach())
    loss = F.cross_entropy
    model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=loss, targets=y))
    assert list(model.inputs)[-3:] == ["token", "targets", "targets_"]
    loss(gm(*x), y).backward()
    assert_same(model(*x, targets_=y)["grad.output"], gm.get_parameter("output").grad)


def test_masks_under_which_rows_see_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = perexfx.transform(Masked())
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", (torch.randn(3, 5, 6), some_masks(3))))
    assert list(model.inputs.values()) == [["batch", 5, 6], ["batch", 5, 5]]
    x, mask = torch.randn(4, 5, 6), some_masks(4)
    assert_same(model(x, mask)["output"], gm(x, mask).detach())


class Odd(nn.Module):
    """An input that nothing reads, a buffer, a parameter that comes out as it is, and a result that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("shift", torch.randn(2))

    def forward(self, x: Tensor, unused: Tensor) -> Any:
        return self.frozen(self.layer(x) + self.shift), self.frozen.weight, None, 3


def test_odd_inputs_and_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, x = perexfx.transform(Odd()), torch.randn(4, 3)
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", (x[:2], x[:2])))
    assert model.inputs == {"x": ["batch", 3], "unused": ["batch", 3]}
    found = model(x, x)
    assert_same(found["output.0"], gm(x, x)[0].detach())
    assert_same(found["output.1"], gm.get_parameter("frozen.weight"))
    names = {value.name for value in model.proto.graph.initializer}
    assert names == {"layer.weight", "layer.bias", "frozen.weight", "frozen.bias", "shift"}


@pytest.mark.parametrize("graph", ["forward", "step"])
def test_parameters_too_large_for_one_file(graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perexfx.views.onnx.write.LARGEST", 100)
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(mlp((6, 20, 10))), torch.randn(3, 6), torch.randint(0, 10, (3,))
    rest: dict[str, Any] = {"loss_fn": F.cross_entropy, "targets": y} if graph == "step" else {}
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", x, graph=graph, **rest))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    found = model(x, y) if graph == "step" else model(x)
    expected = F.cross_entropy(gm(x), y) if graph == "step" else gm(x)
    assert_same(found["loss" if graph == "step" else "output"], expected.detach())


def transformers_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, **sizes)).eval()


def of_transformers(kind: str) -> dict[str, Any]:
    ids = torch.randint(0, 20, (3, 6))
    return {"input_ids": ids, "use_cache": False} if kind == "gpt2" else {"input_ids": ids}


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_transformers(kind: str, tmp_path: Path) -> None:
    model, inputs = transformers_model(kind), of_transformers(kind)
    gm = perexfx.transform(model, inputs)
    exported = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", inputs))
    assert exported.inputs == {"input_ids": ["batch", 6]}
    ids = torch.randint(0, 20, (5, 6))
    assert_same(exported(ids)["logits"], gm(**{**inputs, "input_ids": ids}).logits.detach())


def test_a_batch_of_one_size(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.export.export

    def fixed(*args: Any, dynamic_shapes: Any, **options: Any) -> Any:
        if any(dynamic_shapes[0]):
            raise RuntimeError("the size is read")
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", fixed)
    torch.manual_seed(0)
    gm, x = perexfx.transform(mlp((6, 5, 10))), torch.randn(4, 6)
    with caplog.at_level(logging.WARNING, "perexfx"):
        model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", x))
    assert model.inputs == {"input": [4, 6]}
    assert "batches of 4 examples alone" in caplog.text
    assert "the size is read" in caplog.text
    assert_same(model(x)["output"], gm(x).detach())


def test_metadata(tmp_path: Path) -> None:
    x = torch.randn(3, 2, 10, 10)
    gm = perexfx.transform(cnn(), x, clip_norm=0.5, clipping="automatic", strategy={"7": "gram"})
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", x))
    plan = gm.perexfx.plan
    about = metadata(model.proto)
    assert about["perexfx.version"] == model.proto.producer_version == perexfx.__version__
    assert about["perexfx.batch_size"] == "3"
    assert about["perexfx.machine"] == plan.machine
    assert json.loads(about["perexfx.strategies"])["7:weight"] == "gram"
    clip = metadata(model.calls[0])
    assert (clip["perexfx.clip_norm"], clip["perexfx.clipping"]) == ("0.5", "automatic")
    head = metadata(next(call for call in model.calls if call.name == "7"))
    rows = [decision for decision in plan.decisions if decision.site == "7"]
    assert head["perexfx.site"] == head["perexfx.module"] == "7"
    assert (head["perexfx.kind"], head["perexfx.strategy"]) == ("linear", "gram")
    assert float(head["perexfx.predicted_seconds"]) == pytest.approx(sum(d.seconds for d in rows), rel=1e-3)
    assert int(head["perexfx.predicted_bytes"]) == sum(d.chosen.bytes_held for d in rows)
    assert ".py:" in head["perexfx.source"]
    assert str(Path(torch.__file__).parent) not in str(model.proto)


@pytest.mark.parametrize("graph", ["forward", "step"])
def test_the_same_bytes_twice(graph: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(mlp((6, 5, 10))), torch.randn(3, 6), torch.randint(0, 10, (3,))
    rest: dict[str, Any] = {"loss_fn": F.cross_entropy, "targets": y} if graph == "step" else {}
    files = [perexfx.export_onnx(gm, tmp_path / name, x, graph=graph, **rest) for name in ("a.onnx", "b.onnx")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


@pytest.mark.parametrize("graph", ["forward", "step"])
def test_the_module_is_left_as_it_was(graph: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(mlp((6, 5, 10))), torch.randn(4, 6), torch.randint(0, 10, (4,))
    gm[0].eval() if isinstance(gm, nn.Sequential) else gm.get_submodule("0").eval()
    F.cross_entropy(gm(x), y).backward()
    state: Any = gm.perexfx
    plans = runtime_of(gm).plans
    before = (state.norms, state.plan, dict(plans), [p.grad for p in gm.parameters()], list(gm.modules()))
    modes, values = [m.training for m in gm.modules()], [p.clone() for p in gm.parameters()]
    rest: dict[str, Any] = {"loss_fn": F.cross_entropy, "targets": y[:3]} if graph == "step" else {}
    perexfx.export_onnx(gm, tmp_path / "model.onnx", x[:3], graph=graph, **rest)
    plans = runtime_of(gm).plans
    after = (state.norms, state.plan, dict(plans), [p.grad for p in gm.parameters()], list(gm.modules()))
    assert all(one is other for one, other in zip(before[:2], after[:2], strict=True))
    assert before[2].keys() == after[2].keys()
    assert all(one is other for one, other in zip(before[3] + before[4], after[3] + after[4], strict=True))
    assert modes == [m.training for m in gm.modules()]
    assert all(torch.equal(p, value) for p, value in zip(gm.parameters(), values, strict=True))


# The step


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and how it is transformed and trained."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Loss = F.cross_entropy
    options: Any = None


def mean_of_tokens(output: Any, targets: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def tokens() -> Tensor:
    return torch.randint(0, 20, (3, 6))


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, *shape)


class Layers(nn.Module):
    """What torch's own exporter has no gradients for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.same = nn.Conv2d(4, 4, 3, padding=1, dilation=1, groups=4, padding_mode="replicate")
        self.norm = nn.BatchNorm2d(4).eval()
        self.pool = nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.SiLU())
        self.larger = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(scale_factor=2))
        self.head = weight_norm(nn.Linear(36, 10))

    def forward(self, x: Tensor) -> Tensor:
        y = self.larger(self.pool(self.norm(self.same(self.up(x)))))
        return self.head(F.adaptive_avg_pool2d(y, 3).flatten(1))


def recurrent(kind: Any, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = kind(4, 6, batch_first=True, **options)
                self.head = nn.LazyLinear(10)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.layer(x)[0][:, -1])

        model = Recurrent()
        model(torch.zeros(1, 4, 4))
        return model

    return make


STEPS: dict[str, Case] = {
    "cnn": Case(cnn, images(2, 10, 10)),
    "resnet18": Case(lambda: ResNet18(width=8), images(3, 32, 32)),
    "attention": Case(Attention, images(3, 6)),
    "lstm": Case(lambda: SequenceClassifier(4, 5), images(4, 4)),
    "gru": Case(recurrent(nn.GRU), images(4, 4)),
    "projected lstm": Case(recurrent(nn.LSTM, proj_size=3), images(3, 4)),
    "layers": Case(Layers, images(2, 5, 5)),
    "pooled": Case(pooled, images(2, 11, 12)),
    "masked": Case(Masked, lambda: {"x": torch.randn(3, 5, 6), "mask": some_masks(3)}),
    "tied": Case(Tied, tokens, lambda output, y: F.cross_entropy(output, y[:, 0])),
    "gpt2": Case(lambda: transformers_model("gpt2"), lambda: of_transformers("gpt2"), mean_of_tokens),
    "per layer": Case(lambda: mlp((6, 5, 10)), images(6), options={"clipping": "per_layer"}),
    "automatic": Case(lambda: mlp((6, 5, 10)), images(6), options={"clipping": "automatic"}),
    "own clipping": Case(lambda: mlp((6, 5, 10)), images(6), options={"clipping": lambda norms: 1 / (1 + norms)}),
    "unclipped": Case(lambda: mlp((6, 5, 10)), images(6), options={"clip_norm": None}),
}


@pytest.mark.parametrize("name", STEPS)
def test_step(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = STEPS[name]
    module, x = case.model(), case.inputs()
    first = next(leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
    y = first.flip(1) if first.dtype is torch.long else torch.randint(0, 10, (3,))
    gm = perexfx.transform(module, x if isinstance(x, dict) else None, **{"clip_norm": 0.3, **(case.options or {})})
    model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=case.loss, targets=y))
    check_step(model, gm, case.loss, pytree.tree_map(turned, x), y.flip(0))


def turned(value: Any) -> Any:
    """Other examples than those exported with."""
    return value.flip(0) if isinstance(value, Tensor) else value


def check_step(model: Model, gm: Any, loss: Loss, x: Any, y: Tensor) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    found = model(*tensors, targets=y)
    value = loss(gm(**x) if isinstance(x, dict) else gm(x), y)
    value.backward()
    expected = {"loss": value, "norms": gm.perexfx.norms, "clip_factors": gm.perexfx.clip_factors}
    gradients = {f"grad.{name}": p.grad for name, p in gm.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() | gradients.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted.detach(), rtol=1e-4, atol=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, wanted in gradients.items():
        scale = max(float(wanted.abs().max()), 0.1 * largest)
        assert float((found[name] - wanted).abs().max()) <= 1e-4 * scale, name


def step_of_mlp(tmp_path: Path, **options: Any) -> tuple[Model, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(mlp((6, 5, 10)), **options), torch.randn(4, 6), torch.randint(0, 10, (4,))
    path = tmp_path / "step.onnx"
    return Model(perexfx.export_onnx(gm, path, x, graph="step", loss_fn=F.cross_entropy, targets=y)), gm, x, y


class Constants(nn.Module):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + torch.tensor([1.0, 0.0, 2.0])


def test_losses_and_models_with_constants(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(Constants()), torch.randn(4, 6), torch.tensor([0, 2, 1, 1])
    weights = torch.tensor([0.2, 0.3, 0.5])

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets, weight=weights, reduction="sum")

    model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=loss, targets=y))
    assert [name for name in model.inputs if name.startswith("constant")] == []
    check_step(model, gm, loss, x.flip(0), y.flip(0))


def pooled_to_a_pixel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_a_step_whose_images_would_lie_with_their_channels_last(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm, x, y = perexfx.transform(pooled_to_a_pixel()), torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    loss = F.cross_entropy
    for given in (x, x.to(memory_format=torch.channels_last)):
        model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", given, graph="step", loss_fn=loss, targets=y))
        gm.zero_grad()
        check_step(model, gm, loss, x.flip(0), y.flip(0))


def test_files_are_compared_where_the_example_inputs_show_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = pooled_to_a_pixel()
    nn.init.zeros_(module[4].weight)
    gm, x, y = perexfx.transform(module), torch.zeros(4, 3, 8, 8), torch.arange(4)
    monkeypatch.setitem(DECOMPOSITIONS, torch.ops.aten.threshold_backward.default, lambda gradient, *_: 0 * gradient)
    with pytest.raises(perexfx.ExportError, match=r"Output `grad.0.weight` of the ONNX file differs"):
        perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=F.cross_entropy, targets=y)


def test_gradients_that_are_zero_but_for_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = perexfx.transform(nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.CELU()))

    def loss(output: Tensor, _: Any) -> Tensor:
        return output.flatten(1).square().sum(1).mean()

    perexfx.export_onnx(gm, tmp_path / "step.onnx", torch.randn(3, 2, 8, 8), graph="step", loss_fn=loss)


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_that_share_keys(heads: int, tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 2 * heads), nn.Linear(8, 2 * heads)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).flatten(1)

    torch.manual_seed(0)
    gm, x, y = perexfx.transform(Shared()), torch.randn(3, 5, 8), torch.randn(3, 40)
    model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=F.mse_loss, targets=y))
    check_step(model, gm, F.mse_loss, x.flip(0), y.flip(0))


def test_sigmoids_that_are_nearly_zero_or_one(tmp_path: Path) -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.logsigmoid(self.layer(x))

    gm, x = perexfx.transform(Logarithm()), torch.tensor([[-80.0], [-20.0], [8.0], [12.0], [16.0], [30.0]])
    with torch.no_grad():
        gm.layer.weight.fill_(1.0)
        gm.layer.bias.zero_()
    found = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", torch.randn(3, 1)))(x)["output"]
    torch.testing.assert_close(found, gm(x).detach(), rtol=1e-5, atol=0)
    gm, x, y = perexfx.transform(mlp((6, 8, 5))), torch.randn(3, 6), torch.rand(3, 5)
    loss = F.binary_cross_entropy_with_logits
    model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=loss, targets=y))
    check_step(model, gm, loss, 1000 * x, y)


@pytest.mark.parametrize("is_wrong_for", ["one", "more than four"])
def test_batches_that_the_graph_does_not_hold_for(is_wrong_for: str, tmp_path: Path, caplog: Any) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            is_other = x.shape[0] == 1 if is_wrong_for == "one" else x.shape[0] > 4
            return self.layer(x) * 2 if is_other else self.layer(x)

    gm = perexfx.transform(Branches(), torch.randn(3, 4))
    model = Model(perexfx.export_onnx(gm, tmp_path / "model.onnx", torch.randn(3, 4)))
    assert list(model.inputs.values()) == [[3, 4]]
    assert "holds for batches of 3 examples alone" in caplog.text


def test_steps_whose_norms_are_the_same_for_all_inputs(tmp_path: Path) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    def loss(output: Tensor, _: Any) -> Tensor:
        return output.sum()

    gm, x = perexfx.transform(Shift(), clip_norm=1.0, loss_reduction="sum"), torch.randn(3, 4)
    model = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=loss))
    found = model(x)
    assert list(found) == ["loss", "norms", "clip_factors", "grad.shift"]
    assert_same(found["norms"], torch.full((3,), 2.0))
    assert_same(found["grad.shift"], torch.full((4,), 1.5))


def test_a_step_in_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    gm, x, y = perexfx.transform(model), torch.randn(4, 6).double(), torch.tensor([0, 2, 1, 1])
    loss = F.cross_entropy
    found = Model(perexfx.export_onnx(gm, tmp_path / "step.onnx", x, graph="step", loss_fn=loss, targets=y))
    check_step(found, gm, loss, x.flip(0), y.flip(0))


def test_norms_are_those_of_one_example_at_a_time(tmp_path: Path) -> None:
    model, gm, x, y = step_of_mlp(tmp_path)
    norms = []
    for i in range(4):
        gm.zero_grad()
        plain = mlp((6, 5, 10))
        plain.load_state_dict(gm.state_dict())
        F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]).backward()
        norms.append(
            torch.stack([p.grad.square().sum() for p in plain.parameters() if p.grad is not None]).sum().sqrt()
        )
    assert_same(model(x, y)["norms"], torch.stack(norms))


def test_parameters_are_inputs_with_defaults(tmp_path: Path) -> None:
    model, gm, x, y = step_of_mlp(tmp_path)
    assert list(model.inputs) == ["input", "targets"]
    assert {value.name for value in model.proto.graph.input} == {"input", "targets", *dict(gm.named_parameters())}
    before = model(x, y)
    moved = {name: p.detach() - 0.1 * before[f"grad.{name}"] for name, p in gm.named_parameters()}
    options = {value.name for value in model.session.get_overridable_initializers()}
    assert options == moved.keys()
    found = model(x, y, **moved)
    with torch.no_grad():
        for name, p in gm.named_parameters():
            p.copy_(moved[name])
    loss = F.cross_entropy(gm(x), y)
    loss.backward()
    assert_same(found["loss"], loss.detach())
    assert_same(found["norms"], gm.perexfx.norms)
    assert model(x, y)["loss"] == before["loss"]


def test_an_example_that_is_not_finite_counts_as_zero(tmp_path: Path) -> None:
    model, gm, x, y = step_of_mlp(tmp_path, loss_reduction="mean")
    broken = x.clone()
    broken[1, 2] = float("inf")
    found = model(broken, y)
    assert not torch.isfinite(found["norms"][1])
    assert found["clip_factors"][1] == 0
    kept = [0, 2, 3]
    F.cross_entropy(gm(x[kept]), y[kept]).backward()
    for name, p in gm.named_parameters():
        assert_same(found[f"grad.{name}"] * 4 / 3, p.grad)


def test_step_metadata(tmp_path: Path) -> None:
    model, gm, *_ = step_of_mlp(tmp_path, clip_norm=0.5, clipping="per_layer")
    about = metadata(model.proto)
    assert (about["perexfx.graph"], about["perexfx.batch_size"]) == ("step", "4")
    assert (about["perexfx.clip_norm"], about["perexfx.clipping"]) == ("0.5", "per_layer")
    assert json.loads(about["perexfx.strategies"]).keys() == {
        f"{site.name}:{operand.name}" for site in gm.perexfx.sites for operand in site.operands
    }


# What is refused


def dropping() -> tuple[Any, Tensor]:
    return perexfx.transform(nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 10))), torch.randn(3, 6)


@pytest.mark.parametrize("graph", ["forward", "step"])
def test_random_numbers(graph: str, tmp_path: Path) -> None:
    gm, x = dropping()
    rest: dict[str, Any] = {"loss_fn": F.cross_entropy, "targets": torch.zeros(3).long()} if graph == "step" else {}
    with pytest.raises(perexfx.ExportError, match=r"in module `1` .*draws random numbers .* Call `gm.eval\(\)` first"):
        perexfx.export_onnx(gm, tmp_path / "model.onnx", x, graph=graph, **rest)
    assert not list(tmp_path.iterdir())
    perexfx.export_onnx(gm.eval(), tmp_path / "model.onnx", x, graph=graph, **rest)


class Strided(nn.Module):
    """Reads memory that does not lie in order."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("table", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.table.t().as_strided((3,), (1,)))


def test_views_of_memory_that_is_not_in_order(tmp_path: Path) -> None:
    gm, x = perexfx.transform(Strided()), torch.randn(2, 3)
    with pytest.raises(perexfx.ExportError, match=r"test_onnx.py:.* reads memory with `as_strided`"):
        perexfx.export_onnx(gm, tmp_path / "model.onnx", x)


class Unknown(nn.Module):
    """Two operations that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.igamma(x.exp(), x.exp()) + torch.special.zeta(2 + x.exp(), x.exp()) + self.layer(x)


def test_operations_without_translation_are_all_named(tmp_path: Path) -> None:
    gm = perexfx.transform(Unknown())
    with pytest.raises(perexfx.ExportError) as caught:
        perexfx.export_onnx(gm, tmp_path / "model.onnx", torch.randn(2, 3))
    message = str(caught.value)
    assert "igamma" in message
    assert "zeta" in message
    assert "`igamma` (test_onnx.py:" in message
    assert len(caught.value.refusals) == 2


class Largest(nn.Module):
    """An operation without translation, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(2, 4, 3), nn.AdaptiveMaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x)).flatten(1))


def test_refusals_of_a_step_say_where(tmp_path: Path) -> None:
    gm, x, y = perexfx.transform(Largest()), torch.randn(3, 2, 7, 7), torch.zeros(3).long()
    with pytest.raises(perexfx.ExportError, match=r"in module `pool` \(test_onnx.py:\d+\) .*adaptive_max_pool2d"):
        perexfx.export_onnx(gm, tmp_path / "model.onnx", x, graph="step", loss_fn=F.cross_entropy, targets=y)


def test_refusals_of_a_loss_name_the_loss(tmp_path: Path) -> None:
    gm, x, path = perexfx.transform(mlp((3, 2))), torch.randn(4, 3), tmp_path / "model.onnx"

    def bessel(output: Tensor, _: Any) -> Tensor:
        return (torch.special.bessel_j0(output) * torch.special.bessel_j0(2 * output) * output).sum()

    def noisy(output: Tensor, _: Any) -> Tensor:
        return (output * torch.rand_like(output)).sum()

    with pytest.raises(perexfx.ExportError, match=r"`loss_fn` \(test_onnx.py:\d+\) calls `aten.special_bessel_j0") as e:
        perexfx.export_onnx(gm, path, x, graph="step", loss_fn=bessel)
    assert str(e.value).count("aten.special_bessel_j0.default") == 1
    with pytest.raises(perexfx.ExportError, match=r"`loss_fn` \(test_onnx.py:\d+\) draws random numbers"):
        perexfx.export_onnx(gm, path, x, graph="step", loss_fn=noisy)


@pytest.mark.parametrize(
    ("step", "what", "parts"),
    [({}, "forward", "model"), ({"graph": "step", "loss_fn": F.mse_loss}, "step", "model or of the loss")],
    ids=["forward", "step"],
)
def test_what_torch_cannot_export(
    step: dict[str, Any], what: str, parts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("too deep.\nMore about it.")

    gm, x = perexfx.transform(nn.Linear(3, 2)), torch.randn(4, 3)
    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(perexfx.ExportError) as caught:
        perexfx.export_onnx(gm, tmp_path / "model.onnx", x, **step, **({"targets": torch.zeros(4, 2)} if step else {}))
    assert str(caught.value) == (
        f"`torch.export` cannot export the {what}: too deep. An ONNX file is made from its export. "
        f"Rewrite that part of the {parts} with tensor operations."
    )


def test_losses_that_read_values(tmp_path: Path) -> None:
    gm, x = perexfx.transform(mlp((3, 2))), torch.randn(4, 3)

    def reads(output: Tensor, targets: Tensor) -> Tensor:
        return output.sum() if targets.sum() > 0 else output.mean()

    with pytest.raises(perexfx.CaptureError, match="value of a tensor"):
        perexfx.export_onnx(gm, tmp_path / "model.onnx", x, graph="step", loss_fn=reads, targets=torch.zeros(4))


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, x, path = perexfx.transform(mlp((3, 2))), torch.randn(4, 3), tmp_path / "model.onnx"

    def refused(words: str, *args: Any, **rest: Any) -> None:
        with pytest.raises(perexfx.ArgumentError, match=words):
            perexfx.export_onnx(*args, **rest)

    refused("`gm` should come from `perexfx.transform`. Found Linear", nn.Linear(3, 2), path, x)
    refused('`graph` should be "forward" or "step". Found \'backward\'', gm, path, x, graph="backward")
    refused("`loss_fn` should be a function", gm, path, x, graph="step")
    refused("`loss_fn` belongs to the step", gm, path, x, loss_fn=F.mse_loss)
    refused("`targets` belongs to the step", gm, path, x, targets=x)
    refused("`path` should be a str or a Path. Found int", gm, 3, x)
    refused("folder that exists", gm, tmp_path / "missing" / "model.onnx", x)
    refused("`path` should be a file, or none yet. Found '.*', which is a folder", gm, tmp_path, x)
    refused("The forward fails on `example_inputs`: RuntimeError: mat1 and mat2", gm, path, x.double())
    rest = {"graph": "step", "loss_fn": F.cross_entropy}
    refused("The step fails on `example_inputs` and `targets`", gm, path, x, **rest, targets=torch.zeros(3).long())
    refused("The step fails on `example_inputs` and `targets`", gm, path, x, **rest, targets=torch.zeros(4).int())
    refused("`path` should be a file that can be written. Found 'xxx.*File name too long", gm, "x" * 9999, x)
    refused("`path` should be a file that can be written. Found .* null byte", gm, "a\0.onnx", x)
    refused("`example_inputs` should have one example at least", gm, path, x[:0], graph="step", loss_fn=F.mse_loss)
    refused("`example_inputs` does not fit", gm, path, (x, x))
    refused("have no axis for the examples", gm, path, {"input": 3.0})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(r"`onnxscript`.*pip install 'perexfx\[onnx\]'", gm, path, x)
    assert not list(tmp_path.iterdir())


# Numbers that torch's exporter gets wrong


def test_a_file_with_other_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h.as_strided((h.shape[0], 3), (6, 2))

    def loss(output: Tensor, _: Any) -> Tensor:
        return output.square().mean()

    x, path = torch.randn(4, 6), tmp_path / "model.onnx"
    with pytest.raises(perexfx.ExportError, match=r"Output `norms` of the ONNX file differs from torch's by 1.0e\+00"):
        perexfx.export_onnx(perexfx.transform(Strided(), x), path, x, graph="step", loss_fn=loss)
    monkeypatch.setattr("perexfx.views.onnx.repairs._OWN", {})
    pooling, squares = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2, divisor_override=3)), torch.randn(2, 1, 4, 4)
    with pytest.raises(perexfx.ExportError, match=r"Output `output` of the ONNX file differs"):
        perexfx.export_onnx(perexfx.transform(pooling, squares), path, squares)
    assert not list(tmp_path.iterdir())


def test_outputs_whose_paths_read_alike(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return {"a": {"b": self.layer(x)}, "a.b": 2 * self.layer(x)}

    x = torch.randn(4, 6)
    perexfx.export_onnx(perexfx.transform(Twice(), x), tmp_path / "model.onnx", x)
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output] == ["a.b", "a.b_"]


# Resizing and pooling, of which torch has many special cases


RESIZED = {
    "linear": ("upsample_linear1d_backward", 1),
    "bilinear": ("upsample_bilinear2d_backward", 2),
    "trilinear": ("upsample_trilinear3d_backward", 3),
    "bicubic": ("upsample_bicubic2d_backward", 2),
    "nearest": ("upsample_nearest2d_backward", 2),
    "nearest-exact": ("_upsample_nearest_exact2d_backward", 2),
}


@pytest.mark.parametrize("mode", RESIZED)
def test_the_backward_of_resizing(mode: str) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    name, rank = RESIZED[mode]
    for _ in range(60):
        x = torch.randn(2, 2, *draw.choices(range(1, 9), k=rank), dtype=torch.double, requires_grad=True)
        corners = {} if mode.startswith("nearest") else {"align_corners": draw.random() < 0.3}
        scales = draw.choices([0.5, 0.7, 1.0, 1.1, 1.7, 2.0, 2.3], k=rank) if draw.random() < 0.7 else None
        size = None if scales else draw.choices(range(1, 12), k=rank)
        if scales and 0 in [math.floor(f * n) for f, n in zip(scales, x.shape[2:], strict=True)]:
            continue
        output = F.interpolate(x, size, scales, mode, **corners)
        gradient = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, x, gradient)
        given = list(output.shape[2:]), list(x.shape), *corners.values(), *(scales or [None] * rank)
        found = DECOMPOSITIONS[getattr(torch.ops.aten, name).default](gradient, *given)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        op = getattr(torch.ops.aten, name.removesuffix("_backward")).vec
        if op in BY_SCALE:
            found = BY_SCALE[op](x, size, corners["align_corners"], scales)
            torch.testing.assert_close(found, output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 3])
def test_average_pools(rank: int) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    pool, op = [(F.avg_pool2d, "avg_pool2d"), (F.avg_pool3d, "avg_pool3d")][rank - 2]
    for _ in range(60):
        x = torch.randn(2, 2, *draw.choices(range(3, 9), k=rank), dtype=torch.double, requires_grad=True)
        kernel, stride = draw.choices([1, 2, 3], k=rank), draw.choices([1, 2, 3], k=rank)
        padding = [draw.randint(0, k // 2) for k in kernel]
        rest = draw.random() < 0.5, draw.random() < 0.5, draw.choice([None, 2, 5])
        output = pool(x, kernel, stride, padding, *rest)
        gradient = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, x, gradient)
        found = DECOMPOSITIONS[getattr(torch.ops.aten, f"{op}_backward").default](
            gradient, x, kernel, stride, padding, *rest
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        found = DECOMPOSITIONS[getattr(torch.ops.aten, op).default](x, kernel, stride, padding, *rest)
        if rest[-1]:
            torch.testing.assert_close(found, output, rtol=1e-9, atol=1e-9)
        else:  # then torch's own is right
            assert found is NotImplemented
