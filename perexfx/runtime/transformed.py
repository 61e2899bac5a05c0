"""The transformed module: a GraphModule whose forward `torch.compile` leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import fx

from perexfx.capture import WholeGraphModule
from perexfx.runtime.face import PerExample, runtime_of

FACE = "perexfx"
"""Name of the attribute that a transformed module has beside those of the model."""


class Transformed(WholeGraphModule):
    """What `perexfx.transform` returns."""

    is_transformed = True
    perexfx: PerExample

    def __init__(self, body: Mapping[str, Any], graph: fx.Graph, class_name: str = "Transformed") -> None:
        super().__init__(body, graph, class_name)
        runtime_of(self).belongs_to(self)

    def recompile(self) -> Any:
        """Keeps torch.compile out of the forward: it would lose what the nodes leave for the backward."""
        code = super().recompile()
        if FACE in self._modules:
            runtime_of(self).notes.clear()  # they were of another graph
        cls: Any = type(self)
        cls.forward = _uncompiled(cls.forward)
        return code


def _uncompiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs eagerly inside of torch.compile, whose machinery is loaded when it is first called."""
    disabled: list[Callable[..., Any]] = []

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(forward))
        return disabled[0](*args, **kwargs)

    return call


__all__ = ["FACE", "Transformed"]
