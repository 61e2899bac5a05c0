"""Marks that several files of tests share."""

from __future__ import annotations

import pytest

from perexfx import kernels

needs_kernels = pytest.mark.skipif(
    not kernels.are_built(),
    reason="kernels are built for x86-64 with AVX2, where there is a compiler with OpenMP",
)
