"""Plain attributes that a forward assigns: what it may keep from one call to the next.

Promises: a forward that reads what an earlier call has left is refused, for a captured graph has no such memory.
Attributes that are only written, and those that hold what sizes and constants make, do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.ir.errors import CaptureError

_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


Slot = tuple[str, int | None]
"""An attribute by its name with the path of its module, or a place in a list that is one."""


class Attributes:
    """The plain attributes of all modules, as they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {
            f"{path}.{name}".removeprefix("."): (module, name, value)
            for path, module in model.named_modules()
            for name, value in module.__dict__.items()
            if name not in _OWN
        }
        self.lists = {full: list(value) for full, (_, _, value) in self.before.items() if type(value) is list}

    def assigned(self) -> dict[Slot, Any]:
        """What has been changed since, and the values now; attributes that were not there before are left out."""
        found: dict[Slot, Any] = {}
        for full, (module, name, old) in self.before.items():
            if module.__dict__.get(name, old) is not old:
                found[full, None] = module.__dict__[name]
        for full, old in self.lists.items():
            for at, new in enumerate(self.before[full][2]):
                if at >= len(old) or new is not old[at]:
                    found[full, at] = new
        return found

    def refuse_numbers(self) -> None:
        """Raises: CaptureError where a forward has given an attribute another number, truth value or text."""
        for (name, at), new in self.assigned().items():
            old = self.before[name][2]
            if at is None and isinstance(new, bool | int | float | str) and new != old:
                raise CaptureError(
                    f"The forward assigns `{name}`, which was {old!r} and is {new!r} after one call: a captured graph "
                    "would keep to the first. Register it as a buffer and change that in place, or change it outside "
                    "of the forward."
                )

    def tensors(self) -> set[Slot]:
        """Where a forward has put tensors."""
        return {
            slot
            for slot, new in self.assigned().items()
            if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(new))
        }

    def refuse_kept(self, again: Callable[[], str]) -> None:
        """Raises: CaptureError where a forward reads values that an earlier call has assigned.

        Args:
            again: Captures once more; returns how the graph differs, or "".
        """
        kept = {slot for slot, new in self.assigned().items() if _holds_values(new)}
        if not kept:
            return
        empty(self.model, kept)
        try:
            reads = bool(again())
        except Exception:  # whatever fails, fails because something is there that was not before
            reads = True
        if reads:
            refuse_kept(kept)


def empty(model: nn.Module, slots: Collection[Slot]) -> None:
    """Takes away what an earlier call has left."""
    for name, at in slots:
        path, _, own = name.rpartition(".")
        attributes = model.get_submodule(path).__dict__
        if at is None:
            attributes[own] = _Kept()
        else:
            attributes[own][at : at + 1] = [_Kept()]


def refuse_kept(slots: Collection[Slot]) -> None:
    """Raises: CaptureError, that a forward reads what an earlier call has left."""
    names = sorted({name for name, _ in slots})
    raise CaptureError(
        f"The forward keeps values in {', '.join(f'`{name}`' for name in names)} for later calls, which a captured "
        "graph does not record. Pass them in and return them, or register them as buffers and change those in place."
    )


class _Kept:
    """In place of a value of an earlier call: not None, and of no use."""


def _holds_values(value: Any) -> bool:
    """Whether something was computed from the values of inputs or parameters, and not from sizes alone."""
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Proxy)]
    return any(_reads_values(leaf.node) for leaf in leaves)


def _reads_values(node: fx.Node) -> bool:
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or _is_of_shape(current):
            continue
        seen.add(current)
        if current.op in ("placeholder", "get_attr"):
            return True
        stack.extend(current.all_input_nodes)
    return False


def _is_of_shape(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "new_zeros", "new_ones", "new_full")
