"""Pulling gradients of parameter expressions back to their parameters.

Promises: exact, by the expression's own backward (vmapped for per-example gradients); a parameter that was changed
since the forward is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from perexfx.ir.errors import ModeError
from perexfx.ir.factors import Factors
from perexfx.ir.site import Expression
from perexfx.ir.weighed import Weighed
from perexfx.runtime.tape import Tape


def pull_back(tape: Tape, key: tuple[str, str], expression: Expression, gradient: Tensor) -> dict[str, Tensor]:
    """The gradient of an expression's parameters from that of its value."""
    if expression.function is None:
        return {expression.parameters[0]: gradient}
    if expression.transpose is not None:
        return {expression.parameters[0]: expression.transpose(gradient, *tape.constants[key])}
    value, leaves = _evaluated(tape, key, expression)
    found = torch.autograd.grad(value, leaves, gradient, materialize_grads=True)
    return dict(zip(expression.parameters, found, strict=True))


def pull_back_each(tape: Tape, key: tuple[str, str], expression: Expression, gradients: Tensor) -> dict[str, Tensor]:
    """The same for each example's gradient, `[n, *shape]`."""
    if expression.function is None:
        return {expression.parameters[0]: gradients}
    if gradients.shape[0] == 0:
        values = {name: tape.parameters[name] for name in expression.parameters}
        return {name: value.new_zeros(0, *value.shape) for name, value in values.items()}
    if expression.transpose is not None:
        return {expression.parameters[0]: expression.transpose(gradients, *tape.constants[key])}
    value, leaves = _evaluated(tape, key, expression)

    def pulled(gradient: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, leaves, gradient, retain_graph=True, materialize_grads=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # slower, not wrong
        try:
            found: Sequence[Tensor] = torch.func.vmap(pulled)(gradients)
        except RuntimeError:  # a custom function, or an operation that vmap cannot take
            rows = [pulled(gradient) for gradient in gradients]
            found = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return dict(zip(expression.parameters, found, strict=True))


def weighed(tape: Tape, key: tuple[str, str], expression: Expression, factors: Factors) -> Factors:
    """Factors at an expression's value that know what its rows' lengths make of squares."""
    lengths = expression.lengths
    if lengths is None or lengths.function is None:
        return factors
    values = [tape.parameters[name] for name in expression.parameters]
    with torch.no_grad():
        scale, *vectors = lengths.function(*values, *tape.constants[key])
    return Weighed(factors, scale, dict(zip(lengths.axes, vectors, strict=True)))


def check_unchanged(tape: Tape, names: Iterable[str]) -> None:
    """Raises: ModeError where a parameter was changed since the forward."""
    for name in names:
        if tape.parameters[name]._version != tape.versions[name]:
            raise ModeError(
                f"Parameter `{name}` was changed between the forward and the backward, which needs its old value. "
                "Call `backward()` before `optimizer.step()`."
            )


def _evaluated(tape: Tape, key: tuple[str, str], expression: Expression) -> tuple[Tensor, list[Tensor]]:
    """An expression's value, and the copies of its parameters that it was computed from."""
    function, constants = expression.function, tape.constants[key]
    assert function is not None
    values = [tape.parameters[name] for name in expression.parameters]
    check_unchanged(tape, expression.parameters)
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in values]
        return function(*leaves, *constants), leaves


def add_pulled(
    tape: Tape,
    key: tuple[str, str],
    value: Tensor,
    pull_back: Callable[[Tape, tuple[str, str], Expression, Tensor], dict[str, Tensor]],
    sums: dict[str, Tensor],
) -> None:
    """Adds what a value contributes to each trained parameter."""
    pulled = {key[1]: value}
    if key[0]:
        pulled = pull_back(tape, key, tape.sites.operand(key).expression, value)
    for name, part in pulled.items():
        if name in tape.active:
            sums[name] = sums[name] + part if name in sums else part
