"""A machine's seconds add up, and it has a rate for all work that is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from perexfx.ir.cost import Cost, Work
from perexfx.ir.cost_model import BUILT_IN, Machine, Rate
from perexfx.ir.factors import ProductSignature, RowsSignature
from perexfx.sites.regions import convolution_work, image_work
from perexfx.strategies import STRATEGIES
from tests.support.signatures import convolution


def test_machines_add_up() -> None:
    machine = Machine("test", {"a": Rate(2.0, 4.0, 1.0), "b": Rate(math.inf, math.inf, 0.5)})
    assert machine.seconds(Cost((Work("a", flops=4, bytes=4, calls=3), Work("b", flops=9)), 0)) == 3 + 2 + 1 + 0.5
    depthwise = convolution(4, 8, 8, 5)
    depthwise = replace(depthwise, shape=(8, 1, *depthwise.kernel), geometry=replace(depthwise.geometry, groups=8))
    kinds = {
        work.kind
        for strategy in STRATEGIES
        for signature in (
            convolution(4, 2, 2, 5),
            convolution(4, 8, 8, 5),
            replace(convolution(4, 8, 8, 5), has_kernels=True),
            replace(depthwise, has_kernels=True),
            ProductSignature(8, 1, 1, 3, 2, (2, 3)),
            ProductSignature(8, 1, 1, 3, 2, (2, 3), has_kernels=True),
            RowsSignature(4, 5, 9, 3),
        )
        if strategy.refuses(signature) is None
        for work in strategy.cost(signature, 4).work
    }
    for last in (False, True):
        kinds |= {work.kind for work in convolution_work(convolution(4, 2, 2, 5), last)}
        kinds |= {image_work(layer, 8, last).kind for layer in ("max_pool", "group_norm")}
        kinds |= {image_work("group_norm", 8, last, has_kernel=True).kind}
    assert kinds == set(BUILT_IN.rates)
    assert Machine.from_dict(json.loads(json.dumps(BUILT_IN.to_dict()))) == BUILT_IN
    with pytest.raises(KeyError, match="gemm"):
        Machine.from_dict({"name": "old", "rates": {}})
