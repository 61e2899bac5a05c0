"""Plain attributes that a forward assigns: what it may keep from one call to the next.

Promises: a forward that reads what an earlier call has left is refused, for a captured graph has no such memory.
Attributes that are only written, and those that hold what sizes and constants make, do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.ir.errors import CaptureError

_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


@dataclass(frozen=True)
class Assigned:
    """One attribute, or the content of a list in it, that a forward has changed.

    Attributes:
        name: With the path of its module.
        new: Its value now.
        put: Gives it another value.
    """

    name: str
    new: Any
    put: Callable[[Any], None]


class Attributes:
    """The plain attributes of all modules, as they were."""

    def __init__(self, model: nn.Module) -> None:
        self.before = [(path, module, dict(module.__dict__)) for path, module in model.named_modules()]
        self.lists = [
            (f"{path}.{name}".removeprefix("."), value, list(value))
            for path, _, found in self.before
            for name, value in found.items()
            if type(value) is list
        ]

    def assigned(self) -> Iterator[Assigned]:
        """What has been changed since; attributes that were not there before are left out."""
        for path, module, old in self.before:
            for name, new in module.__dict__.items():
                if name in _OWN or name not in old or new is old[name]:
                    continue
                full = f"{path}.{name}".removeprefix(".")
                yield Assigned(full, new, lambda value, own=module, key=name: own.__dict__.update({key: value}))
        for name, value, content in self.lists:
            if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
                yield Assigned(name, list(value), lambda kept, own=value: own.__setitem__(slice(None), [kept]))

    def refuse_numbers(self) -> None:
        """Raises: CaptureError where a forward has given an attribute another number, truth value or text."""
        old = {f"{path}.{name}".removeprefix("."): v for path, _, found in self.before for name, v in found.items()}
        for each in self.assigned():
            if isinstance(each.new, bool | int | float | str) and each.new != old[each.name]:
                raise CaptureError(
                    f"The forward assigns `{each.name}`, which was {old[each.name]!r} and is {each.new!r} after one "
                    "call: a captured graph would keep to the first. Register it as a buffer and change that in place, "
                    "or change it outside of the forward."
                )

    def tensors(self) -> tuple[str, ...]:
        """Names of the attributes to which a forward has assigned tensors."""
        found = self.assigned()
        return tuple(a.name for a in found if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(a.new)))

    def refuse_kept(self, again: Callable[[], str]) -> None:
        """Raises: CaptureError where a forward reads values that an earlier call has assigned.

        Args:
            again: Captures once more; returns how the graph differs, or "".
        """
        kept = [each for each in self.assigned() if _holds_values(each.new)]
        for each in kept:
            each.put(_Kept())
        if not kept:
            return
        try:
            reads = bool(again())
        except Exception:  # whatever fails, fails because something is there that was not before
            reads = True
        if reads:
            refuse_kept([each.name for each in kept])


def empty(model: nn.Module, names: Sequence[str]) -> None:
    """Takes from some attributes what an earlier call has left there."""
    for name in names:
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        value = module.__dict__[own]
        module.__dict__[own] = [_Kept()] if type(value) is list else _Kept()


def refuse_kept(names: Sequence[str]) -> None:
    """Raises: CaptureError, that a forward reads what an earlier call has left in some attributes."""
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
