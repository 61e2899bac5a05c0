"""Kernels of group norms: against torch's own in float64."""

from __future__ import annotations

from ctypes import CDLL

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx import kernels
from perexfx.runtime.memory_formats import in_format
from tests.support.kernels import assert_all_close
from tests.support.losses import squares
from tests.support.oracle import Batch, assert_close, train_step


@pytest.mark.parametrize("sizes", [(3, 64, 9, 32), (2, 6, 3, 1), (1, 17, 20, 17), (5, 12, 1, 3), (2, 40, 33, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_affine", [True, False])
def test_group_norms(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, is_affine: bool, threads: int, level: CDLL
) -> None:
    torch.manual_seed(0)
    n, channels, size, groups = sizes
    x = in_format(3 * torch.randn(n, channels, size, size, dtype=dtype) + 5, torch.channels_last)
    g = in_format(torch.randn(n, channels, size, size, dtype=dtype), torch.channels_last)
    weight, bias = torch.randn(2, channels, dtype=dtype) if is_affine else (None, None)
    forward = kernels.group_norm(x, weight, bias, groups, 1e-5)
    assert forward is not None
    backward = kernels.group_norm_back(g, x, weight, *forward[1:])
    assert backward is not None
    exact = x.double().contiguous().requires_grad_()
    scale = torch.ones(n, channels, dtype=torch.float64) if weight is None else weight.double().repeat(n, 1)
    shift = torch.zeros(n, channels, dtype=torch.float64) if bias is None else bias.double().repeat(n, 1)
    scale.requires_grad_(), shift.requires_grad_()
    y = nn.functional.group_norm(exact, groups) * scale[..., None, None] + shift[..., None, None]
    y.backward(g.double())
    for found, expected in zip((forward[0], *backward), (y.detach(), exact.grad, scale.grad, shift.grad), strict=True):
        assert expected is not None
        assert_all_close(found, expected, dtype)
    assert forward[0].is_contiguous(memory_format=torch.channels_last)


def test_mixed_dtypes_are_left_to_torch() -> None:
    x = in_format(torch.randn(2, 4, 3, 3), torch.channels_last)
    assert kernels.group_norm(x, torch.ones(4, dtype=torch.float64), None, 2, 1e-5) is None


@pytest.mark.parametrize(("scale", "eps"), [(1e16, 1e-5), (1e-13, 1e-30)])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_group_norms_of_very_large_and_small_images(
    scale: float, eps: float, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.GroupNorm(4, 16, eps=eps), nn.Tanh())
    batch = Batch((scale * torch.randn(3, 8, 6, 6).contiguous(memory_format=torch.channels_last),), torch.randn(3))
    found = train_step(perexfx.transform(model, clip_norm=None), batch, squares)
    expected = train_step(model.double(), batch.double(), squares)
    assert_close({name: value.double() for name, value in found.items()}, expected, 1e-4, "gradients")


class Turned(nn.Module):
    """Channels last, with an axis of one element that has a stride of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 1), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).contiguous(memory_format=torch.channels_last).transpose(2, 3)).tanh()


@pytest.mark.parametrize("frozen", ["", "norm.bias", "norm.weight"])
@pytest.mark.parametrize("has_kernels", [True, False])
def test_group_norms_with_an_axis_of_one_element(
    frozen: str, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr("perexfx.kernels.tensors.loaded", lambda: None)
    torch.manual_seed(0)
    model = Turned()
    if frozen:
        model.get_parameter(frozen).requires_grad_(False)
    batch = Batch((torch.randn(3, 2, 1, 7),), torch.randn(3))
    found = train_step(perexfx.transform(model, clip_norm=None), batch, squares)
    assert_close(found, train_step(model, batch, squares), 1e-5, "gradients")
