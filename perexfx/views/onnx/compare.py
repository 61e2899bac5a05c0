"""The comparison that every exported file passes before it is written: onnxruntime's numbers against torch's.

Promises: a file whose numbers are not those of the module, on the example inputs or on others of their shapes, is not
written. Translations of single operations have been wrong without a word (a pool's divisor, an interpolation's scale),
and no list of them is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perexfx.ir.errors import ExportError
from perexfx.ir.refusal import Refusal

_logger = logging.getLogger("perexfx")

TOLERANCE = 1e-3
"""Largest difference, by the norm of all entries; float32 agrees to 1e-5."""
OF_GRADIENTS = 1e-2
"""The same for norms and gradients, which jump where an activation within rounding of a kink changes its sign."""
FEW_DIGITS = 5e-2
"""The same for dtypes of less than 32 bits."""
SMALL = 1e-3
"""Of the largest gradient: gradients below, as that of a bias before a normalisation, may be rounding alone."""
TINY = 1e-6
"""Outputs of less are compared as if they had this norm."""

Trial = tuple[Sequence[Tensor], Mapping[str, Tensor]]
"""Values of a file's last inputs, in order, those before having defaults; and its outputs by name, in order."""


def compare(file: Path, inputs: Sequence[str], trials: Iterable[Trial]) -> None:
    """Runs a file on the inputs that it was made from, and on others.

    Args:
        file: The model.
        inputs: Names of its inputs, those with defaults included.
        trials: What to run it on, and what torch finds.

    Raises:
        ExportError: An output differs; all are named.
    """
    import onnxruntime  # noqa: PLC0415 (an extra)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = None
    for given, expected in trials:
        names = inputs[-len(given) :] if given else []
        values = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, given, strict=True)}
        try:
            session = session or onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            found = session.run(None, values)
        except Exception as error:  # onnxruntime has not every operation in every dtype
            _logger.warning("The ONNX file was not compared with torch: onnxruntime cannot run it: %s", error)
            return
        _compare_one(expected, found)


def _compare_one(expected: Mapping[str, Tensor], found: Sequence[Any]) -> None:
    """Raises: ExportError, where outputs differ."""
    gradients = [value.detach().double().norm() for name, value in expected.items() if _is_gradient(name)]
    largest = max((float(norm) for norm in gradients if norm.isfinite()), default=0.0)
    refusals = []
    for (name, value), other in zip(expected.items(), found, strict=True):
        least = SMALL * largest if _is_gradient(name) else TINY
        error = _difference(value, torch.as_tensor(other), least)
        if not error <= _allowed(name, value):
            refusals.append(_differs(name, error))
    if refusals:
        raise ExportError(refusals)


def _is_gradient(name: str) -> bool:
    return name.startswith("grad.")


def _difference(value: Tensor, other: Tensor, least: float) -> float:
    """Norm of the difference by that of the value, or by the least that counts; what is not finite must be the same."""
    if value.shape != other.shape:
        return float("inf")
    value, other = value.detach().cpu().double(), other.double()
    finite = value.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return float("inf")
    value, other = value[finite], other[finite]
    return float((value - other).norm() / value.norm().clamp(min=max(least, TINY)))


def _allowed(name: str, value: Tensor) -> float:
    if value.is_floating_point() and value.element_size() < 4:
        return FEW_DIGITS
    return OF_GRADIENTS if name in ("norms", "clip_factors") or _is_gradient(name) else TOLERANCE


def _differs(name: str, error: float) -> Refusal:
    return Refusal(
        what=f"Output `{name}` of the ONNX file differs from torch's by {error:.1e} of its norm.",
        why="Torch's exporter translates an operation of the model to another one. Nothing was written.",
        remedy="Replace that operation: `as_strided` is known for it.",
    )


__all__ = ["Trial", "compare"]
