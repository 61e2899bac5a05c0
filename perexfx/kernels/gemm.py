"""Matrix products by the faster of the two libraries that torch has on a CPU.

Torch multiplies float32 matrices through MKL, which on other makers' processors takes up to twice as long as oneDNN:
its kernels for them have vectors of 256 bits, and so half the speed where a processor multiplies 512 at once.
Promises: every product is what torch's own operation gives, up to rounding; whoever traces or compiles sees torch's own
operation; which library has which product depends on the processor and the sizes alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from perexfx.kernels.watched import is_watched

SMALL = 1 << 22
"""Products of fewer flops are left to `F.linear`: oneDNN takes some ten microseconds to begin."""

SMALL_EACH = 1 << 24
"""The same for each of many products: one call for all of them starts once."""

_pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.t() + bias`, as `F.linear`.

    Args:
        rows: Shape `[n, i]`.
        weight: Shape `[o, i]`; a transposed view is as good.
        bias: Shape `[o]`, or None.
    """
    if _is_for_onednn(rows, weight):
        assert _pointwise is not None
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            weight = weight.contiguous()  # with other strides, oneDNN falls back to a kernel a thousand times slower
        return _pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def linear_by(weight: Tensor, like: Tensor) -> Callable[[Tensor], Tensor]:
    """`rows -> rows @ weight.t()` for many calls: the library is chosen once.

    Args:
        weight: Shape `[o, i]`, contiguous.
        like: Its rows are `[*, n, i]`, as every call's.
    """
    rows = like.flatten(0, -3)[0] if like.numel() else like.new_empty(0, weight.shape[1])
    if not _is_for_onednn(rows, weight):
        return partial(F.linear, weight=weight)
    product = torch.ops.mkldnn._linear_pointwise.default
    return partial(product, W=weight, B=None, attr="none", scalars=[], algorithm="")


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.t() @ right`, contiguous: a linear layer's weight gradient.

    oneDNN copies its first factor into rows, so that is the narrower one; where MKL is about as fast, it is the faster.

    Args:
        left: Shape `[n, o]`.
        right: Shape `[n, i]`.
    """
    if not (mkl_is_slow() and _is_for_onednn(left.t(), right.t())):
        return left.t() @ right
    if left.shape[1] <= right.shape[1]:
        return linear(left.t(), right.t())
    return linear(right.t(), left.t()).t().contiguous()


def transposed_products(left: Tensor, right: Tensor) -> Tensor:
    """`left[m].t() @ right[m]` for every m: shape `[m, o, i]`.

    Args:
        left: Shape `[m, t, o]`.
        right: Shape `[m, t, i]`.
    """
    if not are_one_by_one(left, right):
        return left.transpose(1, 2) @ right
    found = left.new_empty(left.shape[0], left.shape[2], right.shape[2])
    for into, each in zip(found, transposed_products_one_by_one(left, right), strict=True):
        into.copy_(each)
    return found


def are_one_by_one(left: Tensor, right: Tensor) -> bool:
    """Whether `transposed_products` are faster one by one, through oneDNN. Arguments as there."""
    return _is_loop_for_onednn(left.transpose(1, 2), right.transpose(1, 2))


def transposed_products_one_by_one(left: Tensor, right: Tensor) -> Iterator[Tensor]:
    """`left[m].t() @ right[m]`, one m after the other, for what `are_one_by_one`. Arguments as there."""
    product = torch.ops.mkldnn._linear_pointwise.default
    for rows, weight in zip(left.transpose(1, 2), _dense(right).transpose(1, 2), strict=True):
        yield product(rows, weight, None, "none", [], "")


def _dense(value: Tensor) -> Tensor:
    """With dense matrices `[m, *, *]`: with other strides, oneDNN falls back to a kernel a thousand times slower."""
    return value if value[:1].is_contiguous() else value.contiguous()


def products(left: Tensor, right: Tensor) -> Tensor:
    """`left[m] @ right[m].t()` for every m: shape `[m, t, s]`.

    Args:
        left: Shape `[m, t, i]`.
        right: Shape `[m, s, i]`.
    """
    if not _is_loop_for_onednn(left, right):
        return left @ right.transpose(1, 2)
    if left.shape[0] == 1:
        return linear(left[0], right[0])[None]
    return torch.stack([linear(a, b) for a, b in zip(left, right, strict=True)])


def _is_loop_for_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether products of `[m, rows, k]` and `[m, columns, k]` are faster one by one through oneDNN."""
    flops = 2 * left.shape[1] * left.shape[2] * right.shape[1]
    return left.shape[0] > 0 and flops >= SMALL_EACH and _is_for_onednn(left[0], right[0])


def _is_for_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN has the product, and is worth its start."""
    return (
        2 * rows.shape[0] * weight.shape[0] * weight.shape[1] >= SMALL
        and onednn_is_faster()
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and type(rows) is type(weight) is Tensor
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.enabled
        and not is_watched()
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this processor's products are faster through oneDNN: where MKL is present and Intel is not."""
    return _pointwise is not None and torch.backends.mkl.is_available() and "AuthenticAMD" in _cpuinfo()


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN is so much faster that nothing else counts: the processor multiplies 512 bits at once."""
    found = re.search(r"^cpu family\s*: (\d+)", _cpuinfo(), re.MULTILINE)
    return onednn_is_faster() and (found is None or int(found.group(1)) >= ZEN5)


ZEN5 = 26
"""Family of the first of AMD's processors with multipliers of 512 bits."""


@cache
def _cpuinfo() -> str:
    described = Path("/proc/cpuinfo")
    return described.read_text() if described.exists() else ""


__all__ = [
    "are_one_by_one",
    "linear",
    "linear_by",
    "mkl_is_slow",
    "onednn_is_faster",
    "products",
    "transposed_product",
    "transposed_products",
    "transposed_products_one_by_one",
]
