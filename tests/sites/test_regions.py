"""Regions with their channels last: the same numbers, and nobody outside can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import perexfx
from perexfx import api
from perexfx.analysis.analyze import Analysis
from perexfx.bench.models import ResNet18, small_cnn
from perexfx.runtime.face import runtime_of
from perexfx.sites.regions import Region, may_reformat
from tests.support.cases import BY_NAME, Case
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted
from tests.support.random_images import RandomImageNetwork

STRATEGIES = ("auto", "materialize", "materialize_norms", "gram", "grouped", "loop", "loop_norms", "gram_shift")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every region that can have its channels last has, whatever it costs and in any dtype."""

    def choose(
        regions: Sequence[Region], graph: fx.Graph, _: nn.Module, analysis: Analysis, *__: Any
    ) -> frozenset[int]:
        return frozenset(at for at, region in enumerate(regions) if may_reformat(region, graph, analysis))

    monkeypatch.setattr(api, "faster_with_channels_last", choose)


def squares(output: Tensor, targets: Tensor) -> Tensor:
    return (output.flatten(1).square().mean(1) * targets).mean()


def check(model: nn.Module, batch: Batch, loss: Any = squares, **options: Any) -> perexfx.Transformed:
    """Norms and sums are those of one example at a time; returns the transformed model."""
    model, batch = model.double(), batch.double()
    gradients = one_at_a_time(model, batch, loss)
    norms = norms_of(gradients)
    clip_norm = float(norms.median())
    gm = perexfx.transform(model, batch.inputs, clip_norm=clip_norm, batch_dim=batch.batch_dim, **options)
    found = train_step(gm, batch, loss)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    assert_close(found, weighted(gradients, (clip_norm / norms).clamp(max=1) / batch.size), 1e-9, "sums")
    return gm


def images(n: int, channels: int, size: int) -> Batch:
    torch.manual_seed(0)
    return Batch((torch.randn(n, channels, size, size),), torch.rand(n))


def active(gm: perexfx.Transformed) -> int:
    """How many regions have their channels last."""
    assert gm.perexfx.plan is not None
    return len(gm.perexfx.plan.channels_last)


def with_regions() -> list[str]:
    """The cases that have a region."""
    return [
        name
        for name, case in BY_NAME.items()
        if runtime_of(perexfx.transform(case.build(), batch_dim=case.batch_dim)).regions
    ]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", with_regions())
def test_cases_are_exact_with_channels_last(name: str, strategy: str) -> None:
    case: Case = BY_NAME[name]
    model, batch = case.build(), case.batch()
    gm = perexfx.transform(model, batch.inputs, batch_dim=case.batch_dim)
    assert gm.perexfx.plan is not None
    applies = {a.strategy.name for d in gm.perexfx.plan.decisions for a in d.alternatives if a.cost and not d.reason}
    if strategy in {"auto", *applies}:
        check(model, batch, case.loss, strategy=strategy)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("make", [lambda: ResNet18(width=4), lambda: ResNet18(width=4, small_images=False), small_cnn])
def test_stock_networks_are_exact(make: Any) -> None:
    torch.manual_seed(0)
    batch = images(4, 1, 28) if make is small_cnn else images(3, 3, 64)
    assert active(check(make(), batch)) == 1


class Mixed(nn.Module):
    """Reads its images in many ways: sizes, sums, views, slices, a branch that joins again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.pool = nn.GroupNorm(2, 4), nn.MaxPool2d(2)
        self.side, self.head = nn.Conv2d(4, 2, 1), nn.Linear(4 * 9 + 4 + 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        y = self.pool(y + self.second(y))
        z = y.view(y.size(0), -1)
        gate = torch.sigmoid(self.side(y))[:, :, 0].sum(2)
        return self.head(torch.cat([z, y.mean((2, 3)), gate], 1))


@pytest.mark.usefixtures("always")
def test_a_view_outside_sees_the_default_format() -> None:
    gm = check(Mixed(), images(4, 3, 6))
    assert active(gm) == 1
    for n in (1, 2, 7):
        batch = images(n, 3, 6).double()
        torch.testing.assert_close(gm(*batch.inputs), Mixed.forward(gm, *batch.inputs))  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("always")
def test_what_is_returned_has_the_default_format() -> None:
    gm = perexfx.transform(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    assert active(gm) == 1
    for n in (0, 1, 2):
        output = gm(torch.randn(n, 3, 8, 8))
        assert output.is_contiguous()
        output.sum().backward()
        assert gm.perexfx.norms is not None
        assert gm.perexfx.norms.shape == (n,)


class WritesThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)) + 1.0
        rows = y.flatten(1)
        rows.mul_(2.0)  # y too
        return self.head(y.sum((2, 3)))


class OverwritesAnImage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x * 1.0
        first = self.conv(image)
        image.view(-1).mul_(3.0)
        return first + self.other(image)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("make", [WritesThroughAView, OverwritesAnImage])
def test_writes_across_the_border_keep_the_format(make: type[nn.Module]) -> None:
    assert active(check(make(), images(3, 2, 5))) == 0


@pytest.mark.usefixtures("always")
def test_writes_inside_are_fine() -> None:
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.Flatten(), nn.Linear(16, 3))
    assert active(check(model, images(3, 2, 6))) == 1


@pytest.mark.usefixtures("always")
def test_images_in_another_format_are_left_alone() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).permute(0, 2, 3, 1)
            return self.head(y.view(x.shape[0], -1, 4)).sum(1)  # a view of channels last alone

    model = Pixels().double()
    batch = images(3, 3, 6).double()
    last = Batch((batch.inputs[0].contiguous(memory_format=torch.channels_last),), batch.targets)
    gm = perexfx.transform(model, last.inputs)
    found = train_step(gm, last, squares)
    plain = perexfx.transform(model.to(memory_format=torch.channels_last), clip_norm=1.0)
    assert_close(found, train_step(plain, last, squares), 1e-12, "sums")


def test_equal_maxima_give_their_gradient_to_the_same_position() -> None:
    torch.manual_seed(0)
    image, up = torch.randn(4, 2, 9, 9).round(), torch.randn(4, 2, 5, 5)
    found = []
    for wanted in (torch.contiguous_format, torch.channels_last):
        x = image.contiguous(memory_format=wanted).requires_grad_()
        (gradient,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1), x, up.contiguous(memory_format=wanted))
        found.append(gradient)
    assert torch.equal(*found)


def test_float32_networks_have_their_channels_last_and_are_right() -> None:
    torch.manual_seed(0)
    model, batch = small_cnn(), images(16, 1, 28)
    gm = perexfx.transform(model, batch.inputs, clip_norm=1e-2)
    assert active(gm) == 1
    found, norms = train_step(gm, batch, squares), gm.perexfx.norms
    gradients = one_at_a_time(model.double(), batch.double(), squares)
    expected = norms_of(gradients)
    assert_close({"norms": norms.double()}, {"norms": expected}, 1e-5, "norms")
    factors = (1e-2 / expected).clamp(max=1) / 16
    assert_close({k: v.double() for k, v in found.items()}, weighted(gradients, factors), 1e-5, "sums")


def test_float64_keeps_the_default_format() -> None:
    gm = perexfx.transform(small_cnn().double(), torch.randn(8, 1, 28, 28, dtype=torch.float64))
    assert runtime_of(gm).regions
    assert active(gm) == 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("first", range(0, 160, 20))
def test_random_networks(first: int) -> None:
    """Some are no program (a view of what cannot be viewed), some are refused; all others are exact."""
    exact = 0
    for seed in range(first, first + 20):
        torch.manual_seed(seed)
        model = RandomImageNetwork(seed)
        batch = images(3, model.channels, model.size)
        try:
            norms = norms_of(one_at_a_time(model.double(), batch.double(), squares))
        except RuntimeError:
            continue
        if not torch.isfinite(norms).all() or norms.min() < 1e-8:
            continue
        gm = check(model, batch)
        torch.testing.assert_close(gm(*batch.double().inputs), model(*batch.double().inputs), rtol=1e-11, atol=1e-11)
        exact += active(gm) > 0
    assert exact >= 8


def test_group_norm_of_one_channel_in_another_format() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(1, 1), nn.Flatten(), nn.Linear(16, 2))
    image, weights = torch.randn(3, 1, 4, 4), torch.rand(3)
    found = []
    for x in (image, image.as_strided(image.shape, (16, 1, 4, 1))):
        gm = perexfx.transform(model)
        gm(x).square().mean(1).mul(weights).mean().backward()
        found.append(gm.perexfx.norms)
    torch.testing.assert_close(found[1], found[0])


def test_instance_norm_with_a_gradient_in_another_format() -> None:
    """Torch's own gradient of the weight is wrong here; that of the same numbers in the default format is not."""

    class Norm(nn.Module):
        def __init__(self, moves: bool) -> None:
            super().__init__()
            self.norm, self.moves = nn.InstanceNorm2d(2, affine=True), moves

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return (y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if self.moves else y).sin()

    batch, up = images(3, 2, 4), torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    found = []
    for moves in (False, True):
        gm = perexfx.transform(Norm(moves), batch.inputs)
        (gm(*batch.inputs) * up).mean((1, 2, 3)).mean().backward()
        found.append(gm.perexfx.norms)
    torch.testing.assert_close(found[1], found[0])
