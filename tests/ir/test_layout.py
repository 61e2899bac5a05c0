"""Layouts, on random shapes."""

from __future__ import annotations

import torch
from hypothesis import given

from perexfx.analysis.tags import tags_of
from perexfx.ir.layout import Layout
from tests.support.random_layouts import layouts


@given(layouts())
def test_examples_first(drawn: tuple[Layout, tuple[int, ...], int]) -> None:
    layout, shape, n = drawn
    value = torch.randn(shape)
    first = layout.examples_first(value)
    assert first.shape[:2] == (n, layout.repeats)
    assert torch.equal(first.flatten().sort().values, value.flatten().sort().values)
    if n:
        tags = layout.examples_first(tags_of(layout, shape, n))
        expected = torch.arange(1.0, n + 1).view(-1, *[1] * (tags.dim() - 1))
        assert torch.equal(tags, expected.expand_as(tags))
