"""`torch.autograd.Function`s in a forward: gradients that are what somebody wrote, not what autograd would find.

Promises: while a forward is captured, a custom function is recorded as one call of itself, so that its own backward
runs later; a reentrant checkpoint is recorded as what it checkpoints. Where a capture cannot record one, it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch._functorch import utils as functorch
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction


@dataclass(frozen=True)
class CustomFunction:
    """What a graph calls for a custom function."""

    function: type[Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Its result, by its own forward; gradients by its own backward."""
        return self.function.apply(*args, **kwargs)


def gradients_of(
    function: CustomFunction, args: tuple[Any, ...], kwargs: dict[str, Any], free: Sequence[torch.Tensor]
) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The result of a custom function, and pairs of a tensor and the gradient that its backward gives for it.

    Args:
        function: Is called once, and its backward with gradients of ones.
        args: Its arguments.
        kwargs: Its keyword arguments.
        free: Those tensors among them whose gradient is asked for.
    """
    read = [tensor for tensor in free if tensor.is_floating_point()]
    leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in read}
    own_args, own_kwargs = pytree.tree_map(lambda leaf: leaves.get(id(leaf), leaf), (args, kwargs))
    with torch.enable_grad():
        result = function(*own_args, **own_kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
    if not outputs:
        return detached, []
    given = list(leaves.values())
    found = torch.autograd.grad(outputs, given, [torch.ones_like(o) for o in outputs], allow_unused=True)
    return detached, [(leaf, gradient) for leaf, gradient in zip(given, found, strict=True) if gradient is not None]


Recorder = Callable[[type[Function], tuple[Any, ...], dict[str, Any]], Any]
"""From a function and its arguments to its result; `NotImplemented` to run it as it is."""


@contextmanager
def custom_functions(record: Recorder) -> Iterator[None]:
    """Hands every custom function that is applied to `record`, in the grad mode of its call.

    The forwards are exchanged, and not `apply`, of which modules keep references (`swish = Swish.apply`).
    """
    changed: list[tuple[type[Function], str, Any]] = []
    modes: list[bool] = []  # outside of the functions being applied: inside, torch has switched gradients off
    unwrap = functorch.unwrap_dead_wrappers

    def noting_the_mode(args: Any) -> Any:
        modes.append(torch.is_grad_enabled())
        return unwrap(args)

    try:
        functorch.unwrap_dead_wrappers = noting_the_mode
        for function in _subclasses(Function):
            if function.__module__.startswith("torch.") and function is not CheckpointFunction:
                continue
            for name, replacement in _replacements(function, record, modes).items():
                changed.append((function, name, vars(function).get(name)))
                setattr(function, name, staticmethod(replacement))
        yield
    finally:
        functorch.unwrap_dead_wrappers = unwrap
        for function, name, original in changed:
            if original is None:
                delattr(function, name)
            else:
                setattr(function, name, original)


def _subclasses(kind: type[Any]) -> list[type[Any]]:
    direct = type.__subclasses__(kind)
    return list(dict.fromkeys([*direct, *(inner for each in direct for inner in _subclasses(each))]))


def _replacements(function: type[Function], record: Recorder, modes: list[bool]) -> dict[str, Callable[..., Any]]:
    """The methods that `apply` calls, for while a forward is captured."""
    forward, setup = function.forward, function.setup_context
    has_setup = setup is not Function.setup_context
    recorded: list[bool] = []

    @wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        given = args if has_setup else args[1:]  # without the context
        with torch.set_grad_enabled(modes.pop()):
            if function is CheckpointFunction:
                return given[0](*given[2:])
            result = record(function, given, kwargs)
        recorded.append(result is not NotImplemented)
        return result if recorded[-1] else forward(*args, **kwargs)

    @wraps(setup)
    def replaced_setup(ctx: Any, inputs: Any, output: Any) -> None:
        if not recorded.pop():
            setup(ctx, inputs, output)

    return {"forward": replaced, "setup_context": replaced_setup} if has_setup else {"forward": replaced}
