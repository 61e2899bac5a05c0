"""`F.embedding_bag` of bags of one size, which torch takes apart before an export sees it.

Promises: a call of the overload is recognized only where its offsets are shown to be those of bags of one size that use
up all ids; then ids of shape `[bags, ids]` give the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from perexfx.ir.schemas import all_arguments

_aten = torch.ops.aten
OVERLOADS = (_aten.embedding_bag.default, _aten.embedding_bag.padding_idx)
MODES = ("sum", "mean", "max")


def size_of_bags(node: fx.Node) -> fx.Node | int | None:
    """The size of all bags; None where that is not plain, or more than the bags themselves is read.

    Args:
        node: A call of one of `OVERLOADS` in an exported program, with `meta["val"]`.
    """
    given = all_arguments(node.target, node.args, node.kwargs)
    offsets, ids = given["offsets"], given["indices"]
    reads_more = any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users)
    if reads_more or given["include_last_offset"] or getattr(offsets, "target", None) is not _aten.arange.start_step:
        return None
    start, end, size = offsets.args
    covers_all = str(_value(end)) == str(ids.meta["val"].numel())
    return size if start == 0 and covers_all else None


def _value(number: Any) -> Any:
    return number.meta["val"] if isinstance(number, fx.Node) else number
