"""Per-example gradients, norms and Gram matrices, by functions of their own."""

from __future__ import annotations

import torch

import perexfx
from tests.support.cases import BY_NAME, squares
from tests.support.net import build
from tests.support.oracle import assert_close, norms_of, one_at_a_time


def test_quantities() -> None:
    model, batch = build()
    gradients = one_at_a_time(model, batch, squares)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    each = perexfx.per_example_grads(model, squares, batch.inputs, batch.targets)
    norms = perexfx.per_example_norms(model, squares, batch.inputs[0], batch.targets)
    gram = perexfx.gradient_gram(model, squares, {"x": batch.inputs[0]}, batch.targets)
    assert_close(each, gradients, 1e-9, "gradients")
    assert_close({"norms": norms}, {"norms": norms_of(gradients)}, 1e-9, "norms")
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
    assert_close({"gram": gram}, {"gram": flat @ flat.t()}, 1e-9, "gram")
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_quantities_of_shared_parameters() -> None:
    for name in ("embedding_tied_to_head", "weight_standardised", "positions_by_range", "transposed_tie"):
        case = BY_NAME[name]
        model, batch = case.build(), case.batch()
        each = perexfx.per_example_grads(model, case.loss, batch.inputs, batch.targets)
        assert_close(each, one_at_a_time(model, batch, case.loss), 1e-9, name)
