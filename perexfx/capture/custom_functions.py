"""Gradients that somebody wrote, and not autograd: `torch.autograd.Function`s in a forward, and hooks.

Promises: while a forward is captured, a custom function is recorded as one call of itself, so that its own backward
runs later; a reentrant checkpoint is recorded as what it checkpoints. Where a capture cannot record one, or a backward
is not linear, it is an error; so are hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import fx
from torch._functorch import utils as functorch
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from perexfx.capture.places import user_line
from perexfx.ir.errors import CaptureError


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


@dataclass(frozen=True)
class CustomRun:
    """One run of a custom function and of its backward.

    Attributes:
        result: What it returned.
        gradients: Pairs of a tensor that it was given and the gradient for that.
        seeds: The gradients that the backward was given.
    """

    result: Any
    gradients: list[tuple[torch.Tensor, torch.Tensor]]
    seeds: list[torch.Tensor]


_LINEAR = frozenset(
    "view _unsafe_view _reshape_alias reshape permute transpose t unsqueeze squeeze expand slice select clone detach "
    "alias _to_copy neg sum mean cumsum flip roll cat stack split split_with_sizes unbind diagonal as_strided pad "
    "constant_pad_nd contiguous copy lift_fresh index index_select gather repeat zeros_like ones_like empty_like "
    "full_like new_zeros new_ones new_empty zero zeros ones split_with_sizes_copy movedim triu tril".split()
)
"""Operations that are linear in all tensors that they read, or constant."""
_BILINEAR = frozenset("mul mm bmm matmul mv dot convolution linear einsum outer ger conv2d conv1d multiply".split())
_LINEAR_IN_FIRST = frozenset("div divide true_divide masked_fill threshold_backward".split())


def nonlinear_in(calls: Sequence[Any], seeds: Sequence[torch.Tensor]) -> str:
    """The first recorded operation that may be other than linear in what comes from the seeds; "" where there is none.

    A clipped gradient is a sum of scaled gradients, and so must be what a backward makes of one.
    """
    reached = {id(seed) for seed in seeds}
    for call in calls:
        read = [id(tensor) in reached for tensor in call.given]
        if not any(read) or not call.results:
            continue
        name = call.func._schema.name.split("::")[1].removesuffix("_")
        first_alone = read[0] and not any(read[1:])
        is_linear = (
            name in _LINEAR
            or (name in _BILINEAR and sum(read) == 1)
            or (first_alone and (name in _LINEAR_IN_FIRST or name.endswith("_backward")))
            or (name in ("add", "sub", "where") and _adds(call, read, name))
        )
        if name == "masked_fill":
            is_linear = is_linear and call.named_arguments()["value"] == 0
        if not is_linear:
            return name
        reached.update(id(tensor) for tensor in call.results)
    return ""


def _adds(call: Any, read: list[bool], name: str) -> bool:
    """Whether a sum, or a choice between two values, is of gradients alone."""
    return len(read) == 3 and read[1:] == [True, True] if name == "where" else read == [True, True]


def gradients_of(
    function: CustomFunction, args: tuple[Any, ...], kwargs: dict[str, Any], free: Sequence[torch.Tensor]
) -> CustomRun:
    """One run of a custom function and of its backward.

    Args:
        function: Is called once, and its backward with gradients of ones.
        args: Its arguments.
        kwargs: Its keyword arguments.
        free: The tensors among them whose gradient is asked for.
    """
    read = [tensor for tensor in free if tensor.is_floating_point()]
    leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in read}
    own_args, own_kwargs = pytree.tree_map(lambda leaf: leaves.get(id(leaf), leaf), (args, kwargs))
    with torch.enable_grad():
        result = function(*own_args, **own_kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
    if not outputs or not leaves:
        return CustomRun(detached, [], [])
    given, seeds = list(leaves.values()), [torch.ones_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, given, seeds, allow_unused=True)
    pairs = [(leaf, gradient) for leaf, gradient in zip(given, found, strict=True) if gradient is not None]
    return CustomRun(detached, pairs, seeds)


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


@contextmanager
def no_tensor_hooks() -> Iterator[None]:
    """Raises where a forward registers a hook on a tensor that it computes, which no capture records."""

    def refuse(*_: Any) -> Any:
        raise CaptureError(
            f"The forward registers a hook on a tensor at {user_line()}, which a captured graph does not record. Write "
            "what it does to the gradient as a `torch.autograd.Function`."
        )

    original = torch.Tensor.register_hook
    try:
        torch.Tensor.register_hook = refuse  # pyright: ignore[reportAttributeAccessIssue]
        fx.Proxy.register_hook = refuse  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        torch.Tensor.register_hook = original
        del fx.Proxy.register_hook  # pyright: ignore[reportAttributeAccessIssue]


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
        is_recorded = result is not NotImplemented
        if has_setup:
            recorded.append(is_recorded)
        return result if is_recorded else forward(*args, **kwargs)

    @wraps(setup)
    def replaced_setup(ctx: Any, inputs: Any, output: Any) -> None:
        if not recorded.pop():
            setup(ctx, inputs, output)

    return {"forward": replaced, "setup_context": replaced_setup} if has_setup else {"forward": replaced}
