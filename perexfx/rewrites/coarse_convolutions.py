"""Convolutions over coarse images: with kernels whose taps are summed pixel by pixel.

Promises: the output has ceil(N / 2) pixels where the fine one has N, by construction: images are padded, or cut, on
each side by as much as that takes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from perexfx.kernels.coarse import at_side, at_side_of, cut, half
from perexfx.kernels.geometry import per_axis
from perexfx.kernels.pooled import Slides, averaged_kernel, coarse_axes, mean_axis, mean_of_sides, pooled_kernel
from perexfx.rewrites.coarse import Coarsening, by, label


def convolution(c: Coarsening, node: fx.Node) -> bool:
    """`conv2d`, with a kernel for coarse images."""
    found = arguments_of(node, ("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = {**defaults, **found}
    x, weight = given["input"], given["weight"]
    if x not in c.coarse or not are_numbers(given["stride"], given["dilation"], given["groups"]):
        return False
    taps = c.shapes[weight.name][2:]
    stride, dilation = per_axis(given["stride"], 2), per_axis(given["dilation"], 2)
    padding = _paddings(given["padding"], dilation, taps)
    if padding is None:
        return False
    slides: Slides = tuple(zip(taps, stride, padding, dilation, strict=True))
    out = half(c.size(node))
    w = None if given["bias"] is None else c.new[given["bias"]]
    if c.kernel == "galerkin":
        image, kernel, dilation, words = _mean_kernel(c, node, c.new[x], c.new[weight], slides, out)
    else:
        image, kernel, dilation, words = _side_kernel(c, node, c.new[x], c.new[weight], slides, out)
    new = c.instead(node, torch.conv2d, image, kernel, w, stride, (0, 0), dilation, given["groups"])
    before = f"{by(taps)} on {by(c.size(x))}"
    return c.replaced(node, new, f"{label(node, c.subject)} {before}", f"{words} on {by(half(c.size(x)))}")


_Read = tuple[fx.Node, fx.Node, tuple[int, ...], str]


def _side_kernel(
    c: Coarsening, node: fx.Node, image: fx.Node, weight: fx.Node, slides: Slides, out: tuple[int, ...]
) -> _Read:
    axes = coarse_axes(slides)
    is_whole = all(axis.is_whole for axis in axes)
    dilation = tuple(axis.dilation for axis in axes)
    taps = tuple(axis.size for axis in axes)
    if is_whole and all(axis.lows[0] == axis.lows[1] for axis in axes):
        image = _window(c, node, image, tuple(axis.lows[0] for axis in axes), slides, taps, dilation, out)
        return image, weight, dilation, f"the same {by(taps)}"
    side = c.side(node)
    image = c.call(node, at_side, image, side, slides, out)
    if is_whole:
        return image, weight, dilation, f"the same {by(taps)}, at a side"
    pool = averaged_kernel if c.kernel == "average" else pooled_kernel
    words = "means of taps" if c.kernel == "average" else "sums of taps"
    return image, c.call(node, pool, weight, side, slides), dilation, f"{by(taps)}, {words}"


def _mean_kernel(
    c: Coarsening, node: fx.Node, image: fx.Node, weight: fx.Node, slides: Slides, out: tuple[int, ...]
) -> _Read:
    firsts, taps, dilation = zip(*map(mean_axis, slides), strict=True)
    image = _window(c, node, image, firsts, slides, taps, dilation, out)
    axes = coarse_axes(slides)
    if all(axis.is_whole and axis.lows[0] == axis.lows[1] for axis in axes):
        return image, weight, dilation, f"the same {by(taps)}"
    return image, c.call(node, mean_of_sides, weight, slides), dilation, f"{by(taps)}, means over sides"


def _window(
    c: Coarsening,
    node: fx.Node,
    image: fx.Node,
    first: tuple[int, ...],
    slides: Slides,
    taps: tuple[int, ...],
    dilation: tuple[int, ...],
    out: tuple[int, ...],
) -> fx.Node:
    sizes = zip(out, slides, taps, dilation, strict=True)
    lengths = tuple((o - 1) * slide[1] + d * (k - 1) + 1 for o, slide, k, d in sizes)
    return c.call(node, cut, image, first, lengths)


def transposed(c: Coarsening, node: fx.Node) -> bool:
    """`conv_transpose2d`: the same kernel, spread over coarse images."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    given = {**defaults, **arguments_of(node, names)}
    x, weight = given["input"], given["weight"]
    numbers = (given[name] for name in ("stride", "padding", "groups", "dilation"))
    if x not in c.coarse or not are_numbers(*numbers):
        return False
    taps = c.shapes[weight.name][2:]
    stride, padding, dilation = (per_axis(given[name], 2) for name in ("stride", "padding", "dilation"))
    slides: Slides = tuple(zip(taps, stride, padding, dilation, strict=True))
    out, groups = half(c.size(node)), given["groups"]
    place: tuple[Any, ...]
    if c.kernel == "galerkin":
        first, size, dilation = zip(*map(mean_axis, slides), strict=True)
        kernel, place = c.call(node, mean_of_sides, c.new[weight], slides), (cut, tuple(-low for low in first), out)
    else:
        axes = coarse_axes(slides)
        size, dilation = tuple(axis.size for axis in axes), tuple(axis.dilation for axis in axes)
        side = c.side(node)
        pool = averaged_kernel if c.kernel == "average" else pooled_kernel
        kernel, place = c.call(node, pool, c.new[weight], side, slides), (at_side_of, side, slides, out)
    spread = c.call(node, torch.conv_transpose2d, c.new[x], kernel, None, stride, 0, 0, groups, dilation)
    put, *where = place
    if given["bias"] is None:
        new = c.instead(node, put, spread, *where)
    else:
        bias = c.call(node, torch.reshape, c.new[given["bias"]], (-1, 1, 1))
        new = c.instead(node, operator.add, c.call(node, put, spread, *where), bias)
    return c.replaced(node, new, f"{label(node, c.subject)} {by(taps)}", f"{by(size)} onto {by(out)}")


def _paddings(padding: Any, dilation: tuple[int, ...], taps: tuple[int, ...]) -> tuple[int, ...] | None:
    """What is in front of the image; None where it is computed in the graph."""
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        low, high = (d * (k - 1) // 2 for d, k in zip(dilation, taps, strict=True))
        return low, high
    return per_axis(padding, 2) if are_numbers(padding) else None


def are_numbers(*values: Any) -> bool:
    """Whether values are integers, or lists of such."""
    return all(isinstance(v, int) or (isinstance(v, list | tuple) and are_numbers(*v)) for v in values)


def arguments_of(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """A call's arguments by name, without defaults."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


__all__ = ["are_numbers", "arguments_of", "convolution", "transposed"]
