"""Which tensors kernels are for, and how they are handed to them.

Promises: a kernel gets memory of which its pointer and strides say all there is to say, of a dtype that it is made for;
whoever traces sees no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import CDLL
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from perexfx.kernels.loading import DTYPES, Strides, loaded
from perexfx.kernels.watched import is_watched

_for_sizes: ContextVar[bool] = ContextVar("whether sizes are all that is asked for", default=False)


def is_for_sizes() -> bool:
    """Whether nothing is to be computed."""
    return _for_sizes.get()


@contextmanager
def for_sizes() -> Iterator[None]:
    """Fake tensors inside: what kernels allocate is allocated, and nothing is computed."""
    token = _for_sizes.set(True)
    try:
        yield
    finally:
        _for_sizes.reset(token)


def are_built() -> bool:
    """Whether there are kernels, and they are wanted."""
    return loaded() is not None


def are_for(*tensors: Tensor) -> bool:
    """Whether there are kernels for tensors like these: of their dtypes, on their device, with nobody tracing."""
    return library_for(*tensors) is not None


def level() -> str:
    """Which kernels are used: "avx512", "avx2" or "none"."""
    library = loaded()
    return "none" if library is None else Path(library._name).stem


def library_for(*tensors: Tensor) -> CDLL | None:
    """The kernels; None where there are none for these tensors."""
    dtype = tensors[0].dtype
    is_for_kernels = dtype in DTYPES and all(v.dtype == dtype and _is_plain(v) for v in tensors)
    return loaded() if is_for_kernels and not is_watched() else None


def _is_plain(value: Tensor) -> bool:
    """Whether what a pointer and strides say of it is all there is to know."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and value.numel() > 0
        and not value.is_neg()
        and not value._is_zerotensor()
        and not is_functorch_wrapped_tensor(value)
    )


def pointer(value: Tensor | None) -> int | None:
    """Where its memory begins."""
    return None if value is None else value.data_ptr()


@lru_cache(maxsize=1024)
def strides_of(strides: tuple[int, ...]) -> Strides:
    """Of images `[n, frames, channels, *size]`: not to be changed."""
    return Strides(*strides[:3], *(strides[3:] if len(strides) == 5 else (0, *strides[3:])))
