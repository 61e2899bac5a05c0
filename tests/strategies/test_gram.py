"""Norms from Gram matrices."""

from __future__ import annotations

import pytest
import torch

from perexfx.ir.factors import Product, SharedGram
from perexfx.ir.norms import squared_norms_of
from perexfx.strategies import Gram


@pytest.mark.parametrize("t", [63, 64, 65, 130])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_grams_without_their_lower_quarter(n: int, t: int) -> None:
    torch.manual_seed(0)
    right, shared = torch.randn(n, 1, t, 6).double(), SharedGram(2)
    for features in (2, 5):
        factors = Product(torch.randn(n, 1, t, features).double(), right, (6, features), right_gram=shared)
        expected = squared_norms_of(factors.gradients())
        for product in (factors, Product(factors.left, right, factors.shape)):
            torch.testing.assert_close(Gram().squared_norms(product)[0], expected)
    opposite = Product(torch.ones(1, 1, t, 1), torch.tensor([1.0, -1.0]).repeat(65)[:t].reshape(1, 1, t, 1), (1, 1))
    assert Gram().squared_norms(opposite)[0] >= 0
