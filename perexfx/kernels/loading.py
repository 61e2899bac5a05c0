"""The library of kernels that this processor can run.

Promises: it was built from these sources, and its functions know their arguments. Where none is of use, a warning says
why, once, and nothing else changes. What the functions take is declared here alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
from ctypes import CDLL, POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

_logger = logging.getLogger("perexfx")


class Strides(Structure):
    """Of images `[n, frames, channels, height, width]`."""

    _fields_ = [(name, c_int64) for name in ("by_example", "by_frame", "by_channel", "by_row", "by_column")]


class Slide(Structure):
    """`Slide` of images.h."""

    _fields_ = [
        (name, c_int64)
        for name in (
            *("n", "frames", "groups", "in_channels", "height", "width", "out_channels", "out_height", "out_width"),
            *("kernel_height", "kernel_width", "stride_height", "stride_width", "padding_height", "padding_width"),
            *("dilation_height", "dilation_width"),
        )
    ]


DTYPES = {torch.float32: "float32", torch.float64: "float64"}
"""What kernels are made for."""

_POINTER, _SIZE, _INT = c_void_p, c_int64, c_int
_IMAGE = (_POINTER, POINTER(Strides))
_SIGNATURES = {
    "lstm_steps_back": (None, (_POINTER, _SIZE, *[_POINTER] * 9, *[_SIZE] * 3, _INT, _INT)),
    "group_norm": (None, (*[_POINTER] * 6, *[_SIZE] * 4, c_double, _INT)),
    "group_norm_back": (None, (*[_POINTER] * 8, *[_SIZE] * 4, _INT)),
    "gram": (None, (_POINTER, _SIZE, _SIZE, _POINTER, *[_SIZE] * 3, _INT)),
    "gram_norms": (
        None,
        (*(_POINTER, _SIZE, _SIZE, _POINTER), *(_POINTER, _SIZE, _SIZE, _POINTER), *[_SIZE] * 4, _INT),
    ),
    "gram_ranges": (_SIZE, (_SIZE, _SIZE, _INT)),
    "kernel_gradients": (None, (*_IMAGE, *_IMAGE, *[_POINTER] * 4, POINTER(Slide), _INT)),
    "as_kernel": (None, (_POINTER, _POINTER, *[_SIZE] * 3, _INT)),
    "kernel_gradient_pieces": (_SIZE, (POINTER(Slide), _SIZE, _INT)),
    "product_gradients": (None, (*_IMAGE, *_IMAGE, _POINTER, _POINTER, *[_SIZE] * 5, _INT)),
    "product_gradient_blocks": (_SIZE, (*[_SIZE] * 5, _INT)),
    "thin_product": (None, (*[_POINTER] * 3, *[_SIZE] * 3, _INT)),
    "thin_product_most": (_SIZE, (_SIZE,)),
    "weighted_sum": (None, (POINTER(_POINTER), _POINTER, _POINTER, _SIZE, _SIZE, _INT)),
    "shifted_squares": (None, (*_IMAGE, *_IMAGE, _POINTER, _POINTER, POINTER(Slide), _INT)),
}
"""Functions, without their dtype -> what they return, and their arguments."""
_UNTYPED = (
    *("lstm_steps_back", "kernel_gradient_pieces", "product_gradient_blocks", "gram_ranges", "thin_product_most"),
)
"""Those that there is one of."""

FOLDER = Path(__file__).parent / "cpp"
"""Of the libraries and of their sources."""


@cache
def loaded() -> CDLL | None:
    """The kernels for the best vectors that this processor has; None where they were not built, or are not wanted."""
    if os.environ.get("PEREXFX_KERNELS") == "0":
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    levels = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ())
    paths = [path for level in levels if (path := FOLDER / f"{level}.kernels").exists()]
    for path in paths:
        if (found := load(path)) is not None:
            return found
    if not paths:
        _logger.info("The kernels in C++ were not built: torch's own operations run in their place.")
    return None


def load(path: Path) -> CDLL | None:
    """One library; None, and a warning, where it is not one of this package."""
    try:
        found = CDLL(str(path))
        found.fingerprint.restype = c_char_p
        if found.fingerprint().decode() != _fingerprint():
            raise OSError("it was built from other sources. Install the package again")
        for name, (result, arguments) in _SIGNATURES.items():
            for function in (name,) if name in _UNTYPED else (f"{name}_{dtype}" for dtype in DTYPES.values()):
                getattr(found, function).argtypes = arguments
                getattr(found, function).restype = result
    except (OSError, AttributeError) as error:  # of another system, without what it is linked to, or of another version
        _logger.warning("The kernels in %s cannot be used: %s.", path.name, error)
        return None
    return found


def typed(library: CDLL, name: str, dtype: torch.dtype) -> Any:
    """The function of that name for tensors of this dtype."""
    return getattr(library, f"{name}_{DTYPES[dtype]}")


def _fingerprint() -> str:
    """Of the sources, as setup.py makes it."""
    every = sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in every)).hexdigest()[:16]
