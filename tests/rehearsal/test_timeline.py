"""Peaks of timelines, and what is between two of them."""

from __future__ import annotations

from perexfx.rehearsal.timeline import Span, Timeline


def test_the_peak_of_a_timeline() -> None:
    timeline = Timeline(8, (Span(1, 3, 10), Span(2, 5, 20), Span(6, 7, 25)))
    assert timeline.peak() == 30
    assert timeline.peak({0: 6}, [Span(4, 5, 7)]) == 37
    assert timeline.peak({1: 7}) == 45
    assert timeline.peak({0: 2}) == 30
    assert Timeline(1, ()).peak() == 0


def test_timelines_of_different_steps_have_nothing_between() -> None:
    one, two = Timeline(4, (Span(1, 2, 10),)), Timeline(4, (Span(1, 3, 20),))
    assert one.between(1, two, 2, 3) is None
    assert one.between(1, Timeline(4, (Span(1, 2, 14),)), 3, 6) == Timeline(4, (Span(1, 2, 20),))
