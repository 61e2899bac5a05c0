"""Gradients that convolutions hand on."""

from __future__ import annotations

import pytest
import torch

from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.layers.convolution import _input_gradient


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stride", [(2,), (3, 1), (2, 3), (1, 2, 2)])
def test_input_gradients_of_strided_pixels(stride: tuple[int, ...], last: bool) -> None:
    torch.manual_seed(0)
    rank = len(stride)
    x = torch.randn(2, 3, *(7, 8, 5)[:rank]).double()
    if last and rank == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(4, 3, *[1] * rank).double()
    output = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1](x, weight, None, stride)
    grad_output = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, grad_output)
    geometry = ConvolutionGeometry(stride, (0,) * rank, (1,) * rank, 1)
    found = _input_gradient(grad_output, x.detach(), weight, geometry)
    torch.testing.assert_close(found, expected)
    assert found.stride() == x.stride()
