"""Operations over coarse images: pools, sizes, normalisations, and what goes along channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from perexfx.kernels.coarse import coarse_avg_pool, coarse_max_pool, half, pool_windows
from perexfx.kernels.geometry import per_axis
from perexfx.rewrites.coarse import IMAGE, Coarsening, Handler, by, label
from perexfx.rewrites.coarse_convolutions import are_numbers, arguments_of, convolution, transposed


def _pool(c: Coarsening, node: fx.Node) -> bool:
    """Windows over coarse pixels; what they were in words and in numbers."""
    given = _window_of(c, node)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if x not in c.coarse or given is None:
        return False
    assert isinstance(x, fx.Node)
    kernel, stride, padding, dilation, is_max = given
    windows, counts = pool_windows(kernel, stride, padding, dilation)
    out = half(c.size(node))
    if is_max:
        new = c.instead(node, coarse_max_pool, c.new[x], windows, out)
    else:
        new = c.instead(node, coarse_avg_pool, c.new[x], windows, counts, out)
    words = f"{'max' if is_max else 'average'} of {by(tuple(window[0] for window in windows))}"
    return c.replaced(node, new, f"{label(node, c.subject)} {by(kernel)}", f"{words} on {by(half(c.size(x)))}")


def _window_of(c: Coarsening, node: fx.Node) -> tuple[Any, ...] | None:
    """Kernel, stride, padding, dilation, and whether the largest is taken; None where it does more than that."""
    if node.op == "call_module":
        owner: Any = c.subject.twin.get_submodule(str(node.target))
        names = ("kernel_size", "stride", "padding", "dilation", "return_indices", "divisor_override")
        found: dict[str, Any] = {name: getattr(owner, name, None) for name in names}
        is_max = isinstance(owner, nn.MaxPool2d)
        found["count_include_pad"] = getattr(owner, "count_include_pad", True)
    else:
        is_max = "max" in label(node, c.subject)
        names = ("input", "kernel_size", "stride", "padding")
        more = (
            ("dilation", "ceil_mode", "return_indices")
            if is_max
            else ("ceil_mode", "count_include_pad", "divisor_override")
        )
        found = arguments_of(node, (*names, *more))
    if found.get("return_indices") or found.get("divisor_override"):
        return None
    kernel = found["kernel_size"]
    stride, padding, dilation = found.get("stride") or kernel, found.get("padding") or 0, found.get("dilation") or 1
    if not are_numbers(kernel, stride, padding, dilation):
        return None
    return per_axis(kernel, 2), per_axis(stride, 2), per_axis(padding, 2), per_axis(dilation, 2), is_max


def _to_whole(c: Coarsening, node: fx.Node) -> bool:
    """Adaptive pools, which make a map of a size of their own; but where a size is to follow the image."""
    if node.op == "call_module":
        size: Any = getattr(c.subject.twin.get_submodule(str(node.target)), "output_size", None)
    else:
        size = arguments_of(node, ("input", "output_size")).get("output_size")
    if size is None or (isinstance(size, list | tuple) and None in size):
        return False
    c.new[node] = c.copied(node)
    return True


def _over_space(c: Coarsening, node: fx.Node) -> bool:
    """Means and extremes over both axes of space are about the same; over others nothing changes with the size."""
    x = node.args[0] if node.args else None
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if x not in c.coarse or axes is None or not are_numbers(axes):
        return False
    given: Any = axes if isinstance(axes, list | tuple) else (axes,)
    over = {axis % IMAGE for axis in given if isinstance(axis, int)}
    if over >= {2, 3}:
        c.new[node] = c.copied(node)
        return True
    if over == {1} and len(c.shapes.get(node.name, ())) == IMAGE:
        c.on_coarse(node)
        return True
    return False


def _resize(c: Coarsening, node: fx.Node) -> bool:
    """To half of what it was resized to."""
    if node.op == "call_module":
        owner: Any = c.subject.twin.get_submodule(str(node.target))
        how = {"mode": owner.mode, "align_corners": getattr(owner, "align_corners", None)}
        x = node.args[0]
    else:
        names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
        given = arguments_of(node, names)
        x, how = given["input"], {name: given.get(name) for name in ("mode", "align_corners")}
    if x not in c.coarse or not c.is_image(node):
        return False
    assert isinstance(x, fx.Node)
    out = half(c.size(node))
    new = c.call(
        node, F.interpolate, c.new[x], size=out, mode=how["mode"] or "nearest", align_corners=how["align_corners"]
    )
    return c.replaced(node, new, f"to {by(c.size(node))}", f"to {by(out)}")


def _sizes(c: Coarsening, node: fx.Node) -> bool:
    """Who asks for a size gets the fine one: what is computed from it is meant for the fine image."""
    name = node.args[1] if node.target is getattr else node.target
    x = node.args[0]
    assert isinstance(x, fx.Node)
    if node.target is getattr and name in ("dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"):
        c.new[node] = c.copied(node)
        return True
    if name in ("dim", "ndimension", "is_floating_point", "get_device", "element_size"):
        c.new[node] = c.copied(node)
        return True
    if name not in ("shape", "size") or x.name not in c.shapes:
        return False
    lead = [c.call(node, torch.Tensor.size, c.new[x], axis) for axis in (0, 1)]
    for size in lead:
        size.op, size.target = "call_method", "size"
    shape = (*lead, *c.size(x))
    axis: Any = node.kwargs.get("dim", node.args[1] if node.target == "size" and len(node.args) > 1 else None)
    c.new[node] = shape if axis is None or node.target is getattr else shape[axis]
    return True


def _norm(c: Coarsening, node: fx.Node) -> bool:
    x = node.args[0] if node.args else node.kwargs.get("input")
    if x not in c.coarse:
        return False
    c.on_coarse(node)
    return True


def _along_channels(c: Coarsening, node: fx.Node) -> bool:
    """Operations along axis 1, given by `dim`, as softmax."""
    if node.op == "call_module":
        owner: Any = c.subject.twin.get_submodule(str(node.target))
        dim = 1 if isinstance(owner, nn.Softmax2d) else getattr(owner, "dim", None)
    else:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if label(node, c.subject) in ("normalize", "cosine_similarity") and dim is None:
        dim = node.args[2] if len(node.args) > 2 else 1
    if not isinstance(dim, int) or dim % IMAGE != 1:
        return False
    c.on_coarse(node)
    return True


def _cat(c: Coarsening, node: fx.Node) -> bool:
    values: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    are_coarse = all(value in c.coarse for value in (values if isinstance(values, list | tuple) else (values,)))
    if not are_coarse or dim not in (1, -3):
        return False
    c.on_coarse(node)
    return True


def _split(c: Coarsening, node: fx.Node) -> bool:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if dim not in (1, -3):
        return False
    c.on_coarse(node)
    return True


def _getitem(c: Coarsening, node: fx.Node) -> bool:
    """Of several values one; of one value examples or channels."""
    x, index = node.args
    assert isinstance(x, fx.Node)
    if x.name not in c.shapes:
        if c.is_image(node):
            c.on_coarse(node)
        else:
            c.new[node] = c.copied(node)
        return True
    if isinstance(index, tuple) and len(index) <= 2 and all(isinstance(part, slice) for part in index):
        c.on_coarse(node)
        return True
    return False


HANDLERS: Mapping[str, Handler] = {
    name: handler
    for handler, names in {
        convolution: "conv2d",
        transposed: "conv_transpose2d",
        _pool: "max_pool2d avg_pool2d MaxPool2d AvgPool2d _max_pool2d",
        _to_whole: "adaptive_avg_pool2d adaptive_max_pool2d AdaptiveAvgPool2d AdaptiveMaxPool2d",
        _over_space: "mean amax amin",
        _resize: "interpolate upsample Upsample UpsamplingNearest2d UpsamplingBilinear2d",
        _sizes: "getattr size shape dim ndimension is_floating_point get_device element_size",
        _norm: "batch_norm group_norm instance_norm local_response_norm LocalResponseNorm prelu dropout2d Dropout2d "
        "feature_dropout channel_shuffle ChannelShuffle dropout Dropout alpha_dropout AlphaDropout contiguous",
        _along_channels: "softmax log_softmax softmin Softmax LogSoftmax Softmin Softmax2d glu GLU normalize",
        _cat: "cat concat concatenate",
        _split: "chunk split",
        _getitem: "getitem",
    }.items()
    for name in names.split()
}
"""Operations that are known by name -> what becomes of them; False: they read grown images."""

__all__ = ["HANDLERS"]
