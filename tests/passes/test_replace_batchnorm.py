"""BatchNorm becomes GroupNorm, nothing else changes, and what cannot is said."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import perexfx
from perexfx.passes.replace_batchnorm import Replaced
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + self.downsample(x))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 10))
    model = nn.Sequential(*stem, Block(8, 12, 1), Block(12, 24, 2), *pool).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets.long())


def test_a_resnet_can_be_transformed_and_is_exact() -> None:
    model = resnet()
    batch = Batch((torch.randn(5, 3, 8, 8).double(),), torch.randint(0, 10, (5,)))
    with pytest.raises(perexfx.MixingError, match=r"perexfx.replace_batchnorm\(model\)"):
        perexfx.transform(model, batch.inputs)
    perexfx.replace_batchnorm(model, groups=4)
    gradients = one_at_a_time(model, batch, loss)
    norms = norms_of(gradients)
    clip_norm = float(norms.median())
    gm = perexfx.transform(model, batch.inputs, clip_norm=clip_norm)
    found = train_step(gm, batch, loss)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, "norms")
    assert_close(found, weighted(gradients, (clip_norm / norms).clamp(max=1) / 5), 1e-9, "gradients")
    assert all(bool(g.any()) for g in found.values())


def test_parameters_stay_and_only_statistics_go() -> None:
    model = resnet()
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    others = {path: module for path, module in model.named_modules() if not isinstance(module, nn.BatchNorm2d)}
    values = {name: value.clone() for name, value in parameters.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert perexfx.replace_batchnorm(model) is model
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert all(torch.equal(after[name], values[name]) for name in parameters)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert list(model.state_dict()) == [key for key in state if not key.endswith(statistics)]
    assert all(model.get_submodule(path) is module for path, module in others.items())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    model(torch.randn(2, 3, 8, 8).double()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].weight, values["1.weight"])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.BatchNorm1d(32), torch.randn(3, 32)),
        (nn.BatchNorm1d(32, affine=False), torch.randn(3, 32, 5)),
        (nn.BatchNorm2d(12, eps=0.1, momentum=None), torch.randn(3, 12, 4, 4)),
        (nn.BatchNorm2d(12, track_running_stats=False), torch.randn(3, 12, 4, 4)),
        (nn.BatchNorm3d(12, dtype=torch.float64), torch.randn(3, 12, 2, 2, 2).double()),
        (nn.SyncBatchNorm(48), torch.randn(3, 48, 4, 4)),
        (nn.BatchNorm2d(12).eval().requires_grad_(False), torch.randn(3, 12, 4, 4)),
    ],
)
def test_it_is_the_group_norm_that_one_would_have_written(layer: nn.Module, x: Tensor) -> None:
    for parameter in layer.parameters():
        parameter.data += torch.randn_like(parameter)
    before = copy.deepcopy(layer)
    after = perexfx.replace_batchnorm(layer, groups=4)
    assert type(after) is nn.GroupNorm
    assert (after.eps, after.affine, after.training) == (before.eps, before.affine, before.training)
    fresh = nn.GroupNorm(after.num_groups, x.shape[1], before.eps, before.affine, dtype=x.dtype)
    assert set(vars(after)) == set(vars(fresh))
    assert repr(after) == repr(fresh)
    if before.affine:
        assert after.weight.requires_grad == before.weight.requires_grad
        fresh.load_state_dict(before.state_dict(), strict=False)
    assert torch.equal(after(x), fresh(x))
    assert torch.equal(pickle.loads(pickle.dumps(after))(x), fresh(x))
    torch.testing.assert_close(after(x[:1]), after(x)[:1], rtol=1e-6, atol=1e-6)
    assert after(x).std() > 0.1


@pytest.mark.parametrize(
    ("channels", "groups", "found"), [(64, 32, 32), (48, 32, 24), (72, 32, 24), (7, 32, 7), (37, 8, 1), (6, 1, 1)]
)
def test_the_number_of_groups_divides_the_channels(channels: int, groups: int, found: int) -> None:
    assert perexfx.replace_batchnorm(nn.BatchNorm2d(channels), groups).num_groups == found
    assert perexfx.replace_batchnorm(nn.BatchNorm3d(channels), groups=groups).num_groups == found


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize(("channels", "found"), [(2, 1), (31, 1), (32, 2), (36, 2), (100, 5), (2048, 32)])
def test_vectors_keep_enough_channels_in_a_group(make: Callable[[int], nn.Module], channels: int, found: int) -> None:
    layer = perexfx.replace_batchnorm(make(channels))
    assert layer.num_groups == found
    assert layer(torch.randn(4, channels)).abs().max() > 0.1


def test_a_layer_in_several_places_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), self.norm, nn.Conv2d(4, 4, 3), self.norm)
            self.listed = [self.norm]

        def forward(self, x: Tensor) -> Tensor:
            return self.listed[0](self.body(x))

    said: list[Replaced] = []
    model = perexfx.replace_batchnorm(Shared(), report=said.append)
    assert type(model.norm) is nn.GroupNorm
    assert model.body[1] is model.body[3] is model.norm is model.listed[0]
    assert [layer.paths for layer in said[0].layers] == [("norm", "body.1", "body.3")]
    perexfx.transform(model, torch.randn(2, 3, 7, 7))


def test_hooks_and_attributes_of_a_layer_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].tag = "mine"
    seen: list[str] = []
    handle = model[1].register_forward_hook(lambda module, inputs, output: seen.append(type(module).__name__))
    perexfx.replace_batchnorm(model)
    model(torch.randn(2, 3, 5, 5))
    assert seen == ["GroupNorm"]
    assert model[1].tag == "mine"
    handle.remove()
    model(torch.randn(2, 3, 5, 5))
    assert len(seen) == 1


def test_it_says_what_it_replaced(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False).eval())
    before, frozen = repr(model[1]), repr(model[2])
    with caplog.at_level(logging.INFO, "perexfx"):
        perexfx.replace_batchnorm(model, report=print)
    expected = [
        "1 layers replaced, 1 left as they are",
        f"  1: {before} -> {model[1]!r}",
        f"  2: {frozen} -> left as it is: its statistics are frozen",
    ]
    assert capsys.readouterr().out.splitlines() == expected
    assert caplog.messages == ["\n".join(expected)]
    said: list[Replaced] = []
    perexfx.replace_batchnorm(nn.BatchNorm1d(4), report=said.append)
    assert str(said[0]).splitlines()[1].startswith("  the model itself: BatchNorm1d(4, ")
    perexfx.replace_batchnorm(nn.Linear(2, 2), report=said.append)
    assert said[1] == Replaced((), ())


def test_frozen_layers_are_left_in_a_model_that_is_trained() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].eval()
    perexfx.replace_batchnorm(model)
    assert [type(module).__name__ for module in model] == ["BatchNorm2d", "Conv2d", "GroupNorm"]
    assert torch.equal(model[0].running_var, torch.ones(4))
    perexfx.transform(model, torch.randn(2, 4, 5, 5))
    perexfx.replace_batchnorm(model, keep_frozen=False)
    assert type(model[0]) is nn.GroupNorm
    assert not model[0].training


def test_a_model_in_eval_mode_is_replaced_as_a_whole() -> None:
    model = perexfx.replace_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval())
    assert [type(module) for module in model] == [nn.GroupNorm, nn.GroupNorm]


def test_eval_without_statistics_is_not_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    model[0].eval()
    assert type(perexfx.replace_batchnorm(model)[0]) is nn.GroupNorm


def test_instance_norm_loses_its_statistics_alone() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, affine=True, track_running_stats=True))
    x = torch.randn(2, 3, 9)
    expected = model(x)
    weight = model[1].weight
    perexfx.replace_batchnorm(model)
    assert type(model[1]) is nn.InstanceNorm1d
    assert model[1].weight is weight
    assert torch.equal(model(x), expected)
    assert [key for key in model.state_dict() if key.startswith("1")] == ["1.weight", "1.bias"]
    assert set(vars(model[1])) == set(vars(nn.InstanceNorm1d(4)))
    torch.testing.assert_close(perexfx.transform(model, x)(x), expected)


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Renamed(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-2)


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def parametrized() -> nn.Module:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    layer = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Exp())
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Activated(4), r"`1` \(Activated\) cannot be replaced: its forward is not torch's own"),
        (patched, r"`1` \(BatchNorm2d\) cannot be replaced: its forward is not torch's own"),
        (parametrized, r"`1` \(ParametrizedBatchNorm2d\) cannot be replaced: its parameters are computed from others"),
        (lambda: nn.BatchNorm1d(1), r"`1` \(BatchNorm1d\) cannot be replaced: normalising a single number"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_anything_changes(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), make())
    with pytest.raises(perexfx.RefusedError, match=reason) as refused:
        perexfx.replace_batchnorm(model)
    assert "Replace it yourself first." in str(refused.value)
    assert [refusal.place.module for refusal in refused.value.refusals] == ["1"]
    assert type(model[0]) is nn.BatchNorm2d
    model[1].eval()
    if model[1].running_mean is not None:
        perexfx.replace_batchnorm(model)  # frozen: left as it is
        assert type(model[0]) is nn.GroupNorm


def test_subclasses_that_compute_the_same_are_replaced() -> None:
    layer = perexfx.replace_batchnorm(Renamed(8), groups=4)
    assert repr(layer) == repr(nn.GroupNorm(4, 8, eps=1e-2))


def test_lazy_layers_need_their_channels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy modules experimental
        for affine in (True, False):
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(affine=affine))
            with pytest.raises(perexfx.ArgumentError, match=r"`1` \(LazyBatchNorm2d\) has no channels yet. Call the"):
                perexfx.replace_batchnorm(model)
            model(torch.randn(2, 3, 5, 5))
            assert perexfx.replace_batchnorm(model)[1].num_channels == 4


def test_arguments() -> None:
    with pytest.raises(perexfx.ArgumentError, match=r"`model` should be a torch.nn.Module. Found str."):
        perexfx.replace_batchnorm("model")  # pyright: ignore[reportArgumentType]
    for groups in (0, -1, 2.0, True):
        with pytest.raises(perexfx.ArgumentError, match="`groups` should be a positive number"):
            perexfx.replace_batchnorm(nn.BatchNorm2d(4), groups)  # pyright: ignore[reportArgumentType]
    with pytest.raises(perexfx.ArgumentError, match="was transformed already"):
        perexfx.replace_batchnorm(perexfx.transform(nn.Linear(2, 2)))
