"""Functions that become one node of a traced graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

Forward = Callable[..., Any]


def as_node(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of a function that traced code calls as one node: its body runs with the graph.

    Args:
        function: May look at the values, ranks and dtypes of its arguments; reads no parameter but through them.
        args: At least one of them is a proxy.
        kwargs: By name.
    """
    proxy = next(arg for arg in args if isinstance(arg, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", function, args, kwargs)
