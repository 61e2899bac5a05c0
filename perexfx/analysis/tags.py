"""Tags: which example does each element of a value belong to?

Promises: a layout and its tags say the same; tags that follow no layout raise `Mixing`. Tags of a value with one
example axis take no more memory than that axis, whatever the value's shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from perexfx.ir.layout import Layout


class Mixing(Exception):  # noqa: N818
    """An operation combines examples; the message says how."""


class Unknown(Exception):  # noqa: N818
    """An operation has no rule here."""


def tags_of(layout: Layout | None, shape: Sequence[int], n: int) -> Tensor:
    """Which example each element belongs to, counted from 1; 0 for none. Strides are 0 where possible."""
    if layout is None:
        return torch.zeros(()).expand(tuple(shape))
    numbers = torch.arange(1.0, n + 1).view(1, n, 1).expand(layout.before, n, layout.after).reshape(-1)
    sizes = [1] * len(shape)
    sizes[layout.axis] = -1
    return numbers.view(sizes).expand(tuple(shape))


def layout_of(tags: Tensor, n: int) -> Layout | None:
    """The layout that tags follow; elements that belong to no example go with the others along the axis.

    Raises:
        Mixing: They follow none.
    """
    small = tags
    for axis in range(tags.dim()):
        if small.stride(axis) == 0 and small.shape[axis] > 1:
            small = small.narrow(axis, 0, 1)
    if small.numel() == 0 or not bool(small.any()):
        return None
    least = torch.where(small == 0, math.inf, small)
    for axis in range(tags.dim()):
        others = [other for other in range(tags.dim()) if other != axis]
        profile = small.amax(others) if others else small
        if not torch.equal(profile, least.amin(others) if others else least):
            continue
        found = _factor(profile.tolist(), n)
        if found is not None and profile.numel() == tags.shape[axis]:
            return Layout(axis, *found)
    raise Mixing("it moves examples so that no axis holds all of them in order")


def _factor(profile: list[float], n: int) -> tuple[int, int] | None:
    """`(before, after)` such that the profile counts `1..n`, each `after` times, `before` times over."""
    size = len(profile)
    if size % n:
        return None
    after = next((at for at, tag in enumerate(profile) if tag != profile[0]), size)
    if size % (n * after):
        return None
    before = size // (n * after)
    wanted = [float(i + 1) for _ in range(before) for i in range(n) for _ in range(after)]
    return (before, after) if profile == wanted else None
