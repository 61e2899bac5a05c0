"""Tags of examples tell layouts, on random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perexfx.analysis.tags import Mixing, layout_of, tags_of
from perexfx.ir.layout import Layout
from tests.support.random_layouts import layouts


@given(layouts())
def test_tags_tell_the_layout(drawn: tuple[Layout, tuple[int, ...], int]) -> None:
    layout, shape, n = drawn
    if n < 2:
        return
    tags = tags_of(layout, shape, n)
    assert layout_of(tags, n) == layout
    assert layout_of(tags.contiguous(), n) == layout
    with pytest.raises(Mixing):
        layout_of(tags.flip(layout.axis), n)


@given(layouts(), st.integers(0, 3))
def test_elements_of_no_example_go_with_the_others(drawn: tuple[Layout, tuple[int, ...], int], amount: int) -> None:
    layout, shape, n = drawn
    if n < 2 or layout.axis == len(shape) - 1:
        return
    padded = torch.nn.functional.pad(tags_of(layout, shape, n), (amount, amount))
    assert layout_of(padded, n) == layout
