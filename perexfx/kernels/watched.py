"""Whether someone watches the operations that run: who traces, compiles, or runs for shapes alone."""

from __future__ import annotations

from torch._C import _len_torch_dispatch_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch


def is_watched() -> bool:
    """Whether a dispatch mode is on. Counted: torch's own flag stays set where an export has failed."""
    return _len_torch_dispatch_stack() > 0 or _len_torch_dispatch_stack_pre_dispatch() > 0


__all__ = ["is_watched"]
