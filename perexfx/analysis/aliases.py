"""Memory that several values share: what an in-place write into one means for the others.

Promises: the tags of a storage say which example each of its elements belongs to, as far as the values that lie in it
are followed; a value that overlaps with examples gets the layout of what it sees, or is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from perexfx.analysis.axes.call import Mixing, Unknown
from perexfx.analysis.tags import layout_of, tags_of
from perexfx.ir.layout import Layout

LARGEST = 2**24
"""Elements of a storage, at most, whose tags are worked out one by one."""


class Memory:
    """Which of the recorded tensors lie in the same storage."""

    def __init__(self) -> None:
        self.tensors: dict[int, dict[int, Tensor]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors."""
        for tensor in tensors:
            self.tensors.setdefault(_storage(tensor), {})[id(tensor)] = tensor

    def others(self, tensor: Tensor) -> list[Tensor]:
        """The other tensors in a tensor's storage."""
        return [other for other in self.tensors.get(_storage(tensor), {}).values() if other is not tensor]

    def seen_by_others(
        self, written: Tensor, layout: Layout, layouts: Mapping[int, Layout], n: int
    ) -> list[tuple[Tensor, Layout]]:
        """The values without a layout that see examples once another has been written, and where they see them.

        Args:
            written: What was written.
            layout: Where it carries examples now.
            layouts: Those known before, by `id`.
            n: Number of examples.

        Raises:
            Mixing: A value sees examples on no one axis.
            Unknown: The storage is too large to work that out, or is seen in several dtypes.
        """
        others = self.others(written)
        if not others:
            return []
        if any(other.dtype.itemsize != written.dtype.itemsize for other in others):
            raise Unknown("it writes examples into memory that is read as another dtype too")
        size = written.untyped_storage().nbytes() // written.dtype.itemsize
        if size > LARGEST:
            raise Unknown(f"it writes examples into a part of a value of more than {LARGEST} entries")
        tags = torch.zeros(size)
        for tensor in [*others, written]:
            known = layout if tensor is written else layouts.get(id(tensor))
            if known is not None:
                place = tags.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
                own = tags_of(known, tensor.shape, n)
                if bool(((place != 0) & (place != own) & (own != 0)).any()):
                    raise Mixing("it writes examples to the places of others")
                place.copy_(own)
        found = []
        for tensor in others:
            if id(tensor) in layouts:
                continue
            seen = layout_of(tags.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).clone(), n)
            if seen is not None:
                found.append((tensor, seen))
        return found


def is_expanded(tensor: Tensor) -> bool:
    """Whether several entries of a tensor are one place in memory."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
