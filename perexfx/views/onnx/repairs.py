"""What torch's exporter has wrong in a forward, put right before it translates.

Promises: only calls of the operations below change, and only in programs where one of them would go wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from perexfx.ir.schemas import arguments_by_name
from perexfx.views.onnx.attention import any_attention
from perexfx.views.onnx.decompositions import log_sigmoid
from perexfx.views.onnx.pooling import BY_SCALE, average

_aten = torch.ops.aten

_OWN: Mapping[Any, Callable[..., Any]] = {
    _aten.avg_pool2d.default: partial(average, rank=2),
    _aten.avg_pool3d.default: partial(average, rank=3),
    _aten.log_sigmoid.default: log_sigmoid,
    _aten.scaled_dot_product_attention.default: any_attention,
    **BY_SCALE,
}


def repaired(program: ExportedProgram) -> ExportedProgram:
    """The same program, with others in the place of operations that would be translated wrongly."""
    wrong = {node.target for node in program.graph.nodes if node.op == "call_function" and _goes_wrong(node)}
    return program.run_decompositions({op: _OWN[op] for op in wrong}) if wrong else program


def _goes_wrong(node: fx.Node) -> bool:
    """Whether torch's exporter has a call wrong."""
    if node.target not in _OWN:
        return False
    if node.target is _aten.log_sigmoid.default:
        return True
    given = arguments_by_name(node.target, node.args, node.kwargs)
    if node.target is not _aten.scaled_dot_product_attention.default:
        return bool(given.get("divisor_override") or given.get("scale_factors"))
    if given.get("dropout_p"):  # which is refused
        return False
    # Rows that see nothing are zero in torch; and the exporter knows four axes and as many keys as queries only.
    is_plain = given["query"].meta["val"].dim() == 4 and not given.get("enable_gqa")
    return given.get("attn_mask") is not None or not is_plain


__all__ = ["repaired"]
