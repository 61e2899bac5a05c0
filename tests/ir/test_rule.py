"""Rules of the user's own, and the fallback in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import perexfx
from perexfx.ir.factors import Factors, Gradient, GradientSignature, Signature
from perexfx.ir.rule import Arguments, Backward, Geometry, Target
from perexfx.views.report import Report
from tests.support.cases import BY_NAME, squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


@fx.wrap
def gated(x: Tensor, gate: Tensor) -> Tensor:
    """A function that the tracer keeps as one node."""
    return x * torch.sigmoid(gate)


class Gated(perexfx.Rule):
    """`y = x * sigmoid(gate)`."""

    kind = "gated"
    targets: Sequence[Target] = (gated,)
    operands = ("gate",)
    inputs = ("x",)

    @staticmethod
    def named(x: Any, gate: Any) -> dict[str, Any]:
        return {"x": x, "gate": gate}

    def signatures(self, arguments: Arguments, geometry: Geometry) -> dict[str, Signature]:
        return {"gate": GradientSignature(geometry.n, geometry.shapes["gate"])}

    def forward(self, arguments: Arguments, geometry: Geometry) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gated(arguments["x"], arguments["gate"]), ()

    def backward(self, call: Backward) -> tuple[dict[str, Tensor], dict[str, Factors]]:
        gate = torch.sigmoid(call.arguments["gate"])
        per_position = call.grad_output_examples_first * call.examples_first("x") * gate * (1 - gate)
        return {"x": call.grad_output * gate}, {"gate": Gradient(per_position.flatten(1, -2).sum(1))}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(3, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return gated(self.layer(x), self.gate).tanh()


def check(rules: Sequence[perexfx.Rule], kind: str) -> Report:
    torch.manual_seed(0)
    model = Model().double()
    batch = Batch((torch.randn(5, 2, 3),), torch.randn(5)).double()
    gradients = one_at_a_time(model, batch, squares)
    norms = norms_of(gradients)
    gm = perexfx.transform(model, batch.inputs, rules=rules)
    found = train_step(gm, batch, squares)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, kind)
    assert_close(found, weighted(gradients, norms.clamp(min=1).reciprocal() / 5), 1e-9, kind)
    assert {row.site: row.kind for row in perexfx.report(gm).rows} == {"layer": "linear", "gate": kind}
    return perexfx.report(gm)


def test_a_rule_of_the_users_own_comes_first() -> None:
    check([Gated()], "gated")


def test_without_it_the_fallback_covers_the_function_and_the_report_says_so() -> None:
    own, fallback = check([Gated()], "gated"), check([], "fallback")
    assert next(r.seconds for r in fallback.rows if r.site == "gate") > next(
        r.seconds for r in own.rows if r.site == "gate"
    )


def test_a_rule_at_shapes_that_it_does_not_cover_says_why() -> None:
    case = BY_NAME["einsums_by_the_fallback"]
    batch = case.batch()
    rows = {row.site: row for row in perexfx.report(perexfx.transform(case.build(), batch.inputs)).rows}
    assert rows["u"].kind == "fallback (einsum)"
    assert "repeats a label" in rows["u"].why_not
    assert "sums its parameter over an axis" in rows["w#2"].why_not
