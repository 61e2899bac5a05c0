"""Matrix products by the faster of the two libraries that torch has on a CPU.

Torch multiplies float32 matrices through MKL, which takes up to twice as long as oneDNN on other makers' processors;
its oneDNN layers (LSTM, convolution) are compared with that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

SMALL = 1 << 22
"""Products of fewer flops are left to `F.linear`: oneDNN takes some ten microseconds to begin."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.t() + bias`, as `F.linear`.

    Args:
        rows: Shape `[n, i]`.
        weight: Shape `[o, i]`.
        bias: Shape `[o]`, or None.
    """
    if _is_for_onednn(rows, weight):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return F.linear(rows, weight, bias)


def _is_for_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN has the product, and is worth its start. Whoever traces sees torch's own operation."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and 2 * rows.numel() * weight.shape[0] >= SMALL
        and rows.is_contiguous()
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and type(rows) is Tensor
        and torch.backends.mkldnn.enabled
        and not is_in_torch_dispatch_mode()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
