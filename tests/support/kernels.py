"""What the tests of kernels share: the libraries, and how close results of either precision have to be."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = {"avx512": ("AVX512",), "avx2": ("AVX512", "AVX2")}
"""Library -> the capabilities of a processor, as torch names them, that can run it."""


def assert_all_close(found: Tensor, exact: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
    """Args: scale: What errors are held against, if not the largest number."""
    tolerance = 3e-5 if dtype == torch.float32 else 1e-12
    largest = float((exact if scale is None else scale).abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=0.0, atol=tolerance * max(1e-30, largest))
