"""Norms from factors."""

from __future__ import annotations

import torch

from perexfx.ir.convolution import Convolution
from perexfx.ir.norms import squared_norms_of
from perexfx.kernels.geometry import ConvolutionGeometry
from perexfx.strategies import STRATEGIES


def test_norms_of_large_gradients_are_accurate_in_float32() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(2, 3_000_001)
    expected = gradients.double().square().sum(1)
    torch.testing.assert_close(squared_norms_of(gradients).double(), expected, rtol=1e-6, atol=0)
    wide = Convolution(
        torch.randn(2, 1, 512, 4, 4),
        torch.randn(2, 1, 512, 4, 4),
        (512, 512, 3, 3),
        ConvolutionGeometry((1, 1), (1, 1), (1, 1), 1),
    )
    doubled = Convolution(wide.layer_input.double(), wide.grad_output.double(), wide.shape, wide.geometry)
    expected = doubled.gradients().flatten(1).square().sum(1)
    for strategy in STRATEGIES:
        if strategy.refuses(wide.signature) is None:
            squared, _ = strategy.squared_norms(wide)
            torch.testing.assert_close(squared.double(), expected, rtol=1e-5, atol=0)
