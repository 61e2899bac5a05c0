"""Random layouts, and shapes that have them."""

from __future__ import annotations

from hypothesis import strategies as st

from perexfx.ir.layout import Layout

small = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], int]:
    """A layout, a shape that has it, and the number of examples."""
    n, before, after = draw(st.integers(0, 5)), draw(small), draw(small)
    shape = draw(st.lists(small, min_size=0, max_size=3))
    axis = draw(st.integers(0, len(shape)))
    return Layout(axis, before, after), (*shape[:axis], before * n * after, *shape[axis:]), n
