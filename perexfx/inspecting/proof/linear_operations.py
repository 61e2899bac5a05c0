"""What is known of aten operations: in which of their arguments they are linear.

Promises: an operation that is named here is linear in what the table says, for all other arguments; what is not named
is not known to be linear. `perexfx.verify` reads it of everything between the clip factors and `.grad`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

_BILINEAR = {
    "mul": "self other",
    "mul_": "self other",
    "mm": "self mat2",
    "bmm": "self mat2",
    "mv": "self vec",
    "dot": "self tensor",
    "addmm": "mat1 mat2",
    "addmv": "mat vec",
    "addmv_": "mat vec",
    "baddbmm": "batch1 batch2",
    "addcmul": "tensor1 tensor2",
    "addcmul_": "tensor1 tensor2",
    "convolution": "input weight",
    "convolution_backward": "grad_output input",
    "mkldnn::_linear_pointwise": "X W",
}
"""Products: the names of their two sides. Each is linear in either."""

_LINEAR = {
    "div": "self other",
    "div_": "self other",
    "embedding_dense_backward": "grad_output indices",
    "gather": "self index",
    "index": "self indices",
    "index_add": "self source index",
    "index_put": "self values indices",
    "index_select": "self index",
    "masked_fill": "self mask",
    "scatter_add": "self src index",
}
"""Operations that are linear in some arguments, while others, which are fixed, choose among them or divide."""

_FIXED = frozenset(("other", "index", "indices", "mask"))

MOVES = frozenset("clone copy_ _to_copy squeeze_ unsqueeze_ stack cat".split())
"""Operations that leave every entry as it is. (Views are none: they share memory.)"""

_SUMS = frozenset("add add_ sub sub_ neg sum mean cumsum flip roll tril triu diag_embed constant_pad_nd".split())
"""Further operations that are linear in all of their tensors together."""

ADDED = {
    **dict.fromkeys(("add", "add_", "sub", "sub_"), "self other"),
    **dict.fromkeys(("cat", "stack"), "tensors"),
    **dict.fromkeys(("addmm", "addmv", "addmv_", "baddbmm", "addcmul", "addcmul_"), "self"),
    "index_add": "self source",
    "index_put": "self values",
    "scatter_add": "self src",
    "masked_fill": "value",
    "mkldnn::_linear_pointwise": "B",
}
"""Operations that add or join: the arguments that come in as they are."""

ZEROS = frozenset("zeros new_zeros zeros_like zero_".split())
"""Operations that give nothing but zeros."""

_BACKWARDS = ("_backward", "_backward_data")
"""End the names of backwards, which are linear in the gradients that they begin with."""


def keeps_fractions(numbers: Mapping[str, Any]) -> bool:
    """Whether an operation's further arguments leave it linear: no rounding, no other activation.

    Args:
        numbers: Its arguments that are no tensors.
    """
    dtype = numbers.get("dtype")
    rounds = numbers.get("rounding_mode") is not None or numbers.get("attr", "none") != "none"
    return not rounds and (dtype is None or dtype.is_floating_point)


def is_multiplied(name: str, clipped: Set[str]) -> bool:
    """Whether a product takes its clipped arguments as factors, and does not choose among them."""
    return name == "masked_fill" or (name in _BILINEAR and bool(clipped & set(_BILINEAR[name].split())))


def is_product(name: str, numbers: Mapping[str, Any], clipped: Set[str], data: Set[str]) -> bool:
    """Whether an operation is linear in clipped arguments that the data of the others is multiplied with.

    Args:
        name: Of the operation.
        numbers: Its arguments that are no tensors.
        clipped: Names of the arguments that follow from the clip factors; a product may be added to such a one too.
        data: Names of those that follow from examples.
    """
    if name == "convolution_backward" and numbers["output_mask"][2]:
        return False  # the gradient of a bias is not multiplied
    if name in _BILINEAR:
        first, second = _BILINEAR[name].split()
        return any(data == {one} and other in clipped and one not in clipped for one, other in _both(first, second))
    return name in _LINEAR and is_linear(name, clipped) and data <= _FIXED


def is_linear(name: str, clipped: Set[str]) -> bool:
    """Whether an operation is linear in its clipped arguments, while the others are constants."""
    if name in MOVES | _SUMS or (name.endswith(_BACKWARDS) and all(word.startswith("grad") for word in clipped)):
        return True
    if name in _BILINEAR:
        return len(clipped & set(_BILINEAR[name].split())) == 1
    return name in _LINEAR and clipped <= set(_LINEAR[name].split()) - _FIXED


def _both(first: str, second: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (first, second), (second, first)


__all__ = ["ADDED", "MOVES", "ZEROS", "is_linear", "is_multiplied", "is_product", "keeps_fractions"]
