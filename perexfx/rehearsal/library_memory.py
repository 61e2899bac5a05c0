"""What torch's CPU kernels allocate that no tensor shows: copies in oneDNN's own formats, and workspaces.

Promises: an estimate from shapes alone, measured on torch 2.13 with oneDNN 3 in float32; zero for all other kernels,
devices and dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


def hidden_bytes(func: Any, args: Any, result: Any) -> int:
    """Bytes that one call allocates besides its result and frees before it returns.

    Args:
        func: An aten operation.
        args: Of the call.
        result: Of the call.
    """
    count = _HIDDEN.get(func)
    return 0 if count is None or not _by_onednn(args[0]) else count(args, result)


def workspace_bytes(func: Any, args: Any) -> int:
    """Bytes of a workspace that a call returns and fake tensors show as empty."""
    if func is not _RNN or not _by_onednn(args[0]):
        return 0
    (steps, examples, features), hidden = args[0].shape, args[5].shape[-1]
    return 4 * steps * examples * (9 * hidden + 25 * max(features, hidden) // 4)


def _by_onednn(value: Tensor) -> bool:
    available = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return available and value.device.type == "cpu" and value.dtype is torch.float32


def _convolution(args: Any, result: Any) -> int:
    """Images in plain formats are copied, and their kernel; with channels last the kernel alone."""
    x, weight = args[0], args[1]
    if _channels_last(x):
        return 2 * _size(weight)
    return max(_copied(x) + _size(weight), _size(result))


def _convolution_backward(args: Any, result: Any) -> int:
    grad_output, x, weight, stride, wanted = args[0], args[1], args[2], args[4], args[10]
    if _channels_last(x):
        return (3 if wanted[1] else 2) * _size(weight)
    copies = 2 if max(stride) > 1 else 1  # a strided one's gradient comes out in a third format
    of_input = max(_size(grad_output) + _size(weight), copies * _size(x)) if wanted[0] else 0
    of_weight = _size(grad_output) + _copied(x) if wanted[1] else 0
    return max(of_input, of_weight)


def _recurrent(args: Any, result: Any) -> int:
    x, weights = args[0], args[1:5]
    steps, examples, _ = x.shape
    gates = weights[1].shape[0]
    return sum(map(_size, weights)) + 4 * steps * examples * gates


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _copied(x: Tensor) -> int:
    """Bytes of a copy of images; those of up to three channels are read as they are."""
    return _size(x) if x.shape[1] > 3 else 0


def _size(value: Tensor) -> int:
    return math.prod(value.shape) * value.element_size()


_RNN = _aten.mkldnn_rnn_layer.default
_HIDDEN: Mapping[Any, Callable[[Any, Any], int]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _RNN: _recurrent,
    _aten.mkldnn_rnn_layer_backward.default: _recurrent,
}


__all__ = ["hidden_bytes", "workspace_bytes"]
