"""The comparison that every exported file passes before it is written: onnxruntime's numbers against torch's.

Promises: a file whose numbers are not those of the module, on the example inputs, is not written. Translations of
single operations have been wrong without a word (a pool's divisor, an interpolation's scale), and no list of them is
complete.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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


def compare(file: Path, given: Sequence[Tensor], expected: Mapping[str, Tensor]) -> None:
    """Runs a file on the inputs that it was made from.

    Args:
        file: The model.
        given: Values of its last inputs, in order; those before have defaults.
        expected: Its outputs, by name, in order.

    Raises:
        ExportError: An output differs; all are named.
    """
    import onnxruntime  # noqa: PLC0415 (an extra)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()][-len(given) :] if given else []
        values = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, given, strict=True)}
        found: Sequence[Any] = session.run(None, values)
    except Exception as error:  # onnxruntime has not every operation in every dtype
        _logger.warning("The ONNX file was not compared with torch: onnxruntime cannot run it: %s", error)
        return
    refusals = []
    for (name, value), other in zip(expected.items(), found, strict=True):
        error = _difference(value, torch.as_tensor(other))
        if not error <= _allowed(name, value):
            refusals.append(_differs(name, error))
    if refusals:
        raise ExportError(refusals)


def _difference(value: Tensor, other: Tensor) -> float:
    """Norm of the difference by that of the value; entries that are not finite must be the same ones."""
    if value.shape != other.shape:
        return float("inf")
    value, other = value.detach().cpu().double(), other.double()
    finite = value.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return float("inf")
    value, other = value[finite], other[finite]
    return float((value - other).norm() / value.norm().clamp(min=1e-6))


def _allowed(name: str, value: Tensor) -> float:
    if value.is_floating_point() and value.element_size() < 4:
        return FEW_DIGITS
    return OF_GRADIENTS if name in ("norms", "clip_factors") or name.startswith("grad.") else TOLERANCE


def _differs(name: str, error: float) -> Refusal:
    return Refusal(
        what=f"Output `{name}` of the ONNX file differs from torch's by {error:.1e} of its norm.",
        why="Torch's exporter translates an operation of the model to another one. Nothing was written.",
        remedy="Replace that operation: `as_strided` is known for it.",
    )


__all__ = ["compare"]
