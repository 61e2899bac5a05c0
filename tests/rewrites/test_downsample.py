"""Reduced models: the model's own parameters, sizes by construction, and per-example gradients under one draw."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.bench.paper_models import resnet, vgg
from perexfx.rewrites import Rewritten
from perexfx.rewrites.coarse import SIDES
from tests.support.cases_maps import FlatNet, OddNet, UNet
from tests.support.oracle import assert_close, norms_of, weighted

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "odd": (OddNet, (3, 45, 37)),
    "even": (OddNet, (3, 48, 40)),
    "u_net": (UNet, (3, 10, 10)),
    "resnet18": (lambda: resnet(18), (3, 32, 32)),
    "vgg11": (lambda: vgg(11, pixels=32, normalized=True), (3, 32, 32)),
}
DRAW = 7


def loss_of(output: Tensor) -> Tensor:
    """Of each example."""
    return output.flatten(1).sin().sum(1) + output.flatten(1).square().sum(1)


def one_at_a_time(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each example's gradient, all under the same draw."""
    named = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        torch.manual_seed(DRAW)
        loss = loss_of(model(x[i : i + 1])).sum()
        rows.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(parts) for name, parts in zip(named, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kernel", ["side", "galerkin", "average"])
@pytest.mark.parametrize("name", MODELS)
def test_private_gradients_reach_the_models_parameters(name: str, kernel: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, *shape, dtype=torch.float64)
    reduced = perexfx.downsample(model, x, kernel=kernel)
    assert {id(p) for p in reduced.parameters()} == {id(p) for p in model.parameters()}
    truth = one_at_a_time(reduced, x)
    norms = norms_of(truth)
    clip_norm = float(norms.median())
    gm = perexfx.transform(reduced, x, clip_norm=clip_norm)
    torch.manual_seed(DRAW)
    loss_of(gm(x)).mean().backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, name)
    assert_close(found, weighted(truth, (clip_norm / norms).clamp(max=1) / len(x)), 1e-9, name)


def test_every_forward_draws_anew_and_evaluation_does_not() -> None:
    x = torch.randn(2, 3, 45, 37)
    reduced = perexfx.downsample(OddNet(), x)
    gm = perexfx.transform(reduced, x)
    for module in (reduced, gm):
        module.train()
        assert not torch.equal(module(x), module(x))
        torch.manual_seed(1)
        first = module(x)
        torch.manual_seed(1)
        assert torch.equal(module(x), first)
        module.eval()
        assert torch.equal(module(x), module(x))


def test_a_step_as_a_graph_draws_anew() -> None:
    x, y = torch.randn(4, 3, 14, 14), torch.tensor([0, 1, 2, 0])
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 3))
    gm = perexfx.transform(perexfx.downsample(model, x), x)
    step = perexfx.step_graph(gm, F.cross_entropy, x, y)
    assert any("randint" in str(node.target) for node in step.graph.nodes)


def test_sides_are_the_fine_layer_on_images_of_blocks() -> None:
    """The first layer, whatever else the model does: that of the fine image at the side that was drawn."""
    x = torch.randn(2, 3, 6, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    fine, reduced = model(x), perexfx.downsample(model, x)
    reduced.eval()
    coarse = F.avg_pool2d(reduced(x), 2)  # grown to the fine size as an output: whole blocks
    torch.testing.assert_close(coarse, fine[:, :, ::2, ::2])


def test_until_a_stage() -> None:
    x = torch.randn(2, 3, 14, 14)
    model = FlatNet()
    model.head = nn.Linear(4 * 7 * 7, 3)
    whole = perexfx.downsample(model, x)
    first = perexfx.downsample(model, x, until="body.0")
    assert _changed(whole) == ["x", "conv2d", "body_2", "conv2d_1", "flatten"]
    assert _changed(first) == ["x", "conv2d", "body_1"]
    assert first.rewriting.changes[-1].after == "the same, of images grown to 14 x 14"
    assert "until `body.0`" in first.rewriting.summary


def _changed(reduced: Rewritten) -> list[str]:
    return [change.place.node for change in reduced.rewriting.changes]


def test_every_change_says_what_it_became() -> None:
    x = torch.randn(2, 3, 45, 37)
    found = {change.place.node: change for change in perexfx.downsample(OddNet(), x).rewriting.changes}
    stem = found["conv2d"]
    assert (stem.before, stem.after) == ("conv2d 7 x 7 on 45 x 37", "4 x 4, sums of taps on 23 x 19")
    assert stem.place.module == "stem"
    assert stem.place.source.startswith("cases_maps.py:")
    assert found["x"].after == "average of blocks of 2 x 2: 23 x 19"
    assert found["pool"].after == "max of 2 x 2 on 12 x 10"
    galerkin = {c.place.node: c for c in perexfx.downsample(OddNet(), x, kernel="galerkin").rewriting.changes}
    assert galerkin["conv2d_1"].after == "3 x 3, means over sides on 6 x 5"


def test_the_model_is_left_as_it_was() -> None:
    model, x = OddNet(), torch.randn(2, 3, 45, 37)
    before, state = set(dict(model.named_modules())), copy.deepcopy(model.state_dict())
    reduced = perexfx.downsample(model, x)
    reduced(x).sum().backward()
    assert set(dict(model.named_modules())) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(reduced.state_dict()) == set(state)


def test_copies_and_files() -> None:
    x = torch.randn(2, 3, 45, 37)
    reduced = perexfx.downsample(OddNet(), x).eval()
    file = io.BytesIO()
    torch.save(reduced, file)
    file.seek(0)
    for other in (copy.deepcopy(reduced), torch.load(file, weights_only=False)):
        assert isinstance(other, Rewritten)
        assert torch.equal(other(x), reduced(x))
        assert other.rewriting.changes == reduced.rewriting.changes
        assert not {id(p) for p in other.parameters()} & {id(p) for p in reduced.parameters()}


def test_inside_another_module() -> None:
    x = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    model = nn.Sequential(perexfx.downsample(body, x), nn.Linear(4, 2).double()).train()
    truth = norms_of(one_at_a_time(model, x))
    gm = perexfx.transform(model, x)
    torch.manual_seed(DRAW)
    loss_of(gm(x)).mean().backward()
    torch.testing.assert_close(gm.perexfx.norms, truth)


def test_the_proof_covers_it() -> None:
    x = torch.randn(2, 3, 14, 14)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert str(perexfx.verify(perexfx.transform(perexfx.downsample(model, x), x))).startswith("Proved")


def test_other_images_are_refused() -> None:
    x = torch.randn(2, 3, 45, 37)
    reduced = perexfx.downsample(OddNet(), x)
    assert reduced(torch.randn(5, 3, 45, 37)).shape == (5, 3)
    for module in (reduced, perexfx.transform(reduced, x)):
        with pytest.raises(perexfx.ArgumentError, match=r"`x` should be of shape \[0 or more, 3, 45, 37\]"):
            module(torch.randn(2, 3, 45, 38))


class _TakesBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).chunk(2, dim=1)


def test_mistakes() -> None:
    x = torch.randn(2, 3, 14, 14)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    wrong: list[tuple[dict[str, object], str]] = [
        ({"factor": 3}, "`factor` should be 2"),
        ({"factor": True}, "`factor` should be 2"),
        ({"kernel": "mean"}, "`kernel` should be one of 'side', 'galerkin', 'average'"),
        ({"pool": "mean"}, "`pool` should be one of 'average', 'max'"),
        ({"until": "1.2"}, "`until` should be the path of a module that the forward calls, such as '0', '1'"),
        ({"until": 1}, "`until` should be the path"),
    ]
    for options, message in wrong:
        with pytest.raises(perexfx.ArgumentError, match=message):
            perexfx.downsample(model, x, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(perexfx.ArgumentError, match="`example_inputs` should be inputs of the model"):
        perexfx.downsample(model)
    with pytest.raises(perexfx.ArgumentError, match="Reduce first"):
        perexfx.downsample(perexfx.transform(model, x), x)
    with pytest.raises(perexfx.ArgumentError, match=f"`{SIDES}`: it was reduced already"):
        perexfx.downsample(perexfx.downsample(model, x), x)
    with pytest.raises(perexfx.ArgumentError, match="None of the example inputs is an image"):
        perexfx.downsample(nn.Linear(3, 2), torch.randn(4, 3))
    with pytest.raises(perexfx.RefusedError, match="several coarse images at once"):
        perexfx.downsample(_TakesBoth(), x)


def test_a_check_is_not_led_astray_by_draws_that_agree() -> None:
    """With one convolution two of four draws are the same by chance."""
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    gm = perexfx.transform(perexfx.downsample(model, x), x)
    for seed in range(12):
        torch.manual_seed(seed)
        result = perexfx.check(gm, x)
        assert result, result


def test_statistics_of_instances_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    perexfx.downsample(model, torch.randn(2, 3, 8, 8))(torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "running" in name)


def test_compiled_it_draws_anew() -> None:
    """By whoever makes graphs of Python: a graph of one draw holds for all."""
    x = torch.randn(2, 3, 16, 16)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
    reduced = perexfx.downsample(nn.Sequential(first, nn.ReLU(), second), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not traced, and of caches
        compiled = torch.compile(reduced, backend="aot_eager")
        for seed in range(6):
            torch.manual_seed(seed)
            found = compiled(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(found, reduced(x))
