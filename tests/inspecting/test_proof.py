"""The static proof holds for whatever transforms, and a step that breaks a claim is found, with the path."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import perexfx
from perexfx.ir.factors import Factors, Product
from perexfx.layers.linear import Linear
from perexfx.runtime import clip_factors, clipped_sums, nodes
from perexfx.strategies.outer import Outer
from tests.support.cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_whatever_transforms_is_proved(case: Case, clipping: str) -> None:
    batch = case.batch()
    gm = perexfx.transform(case.build(), batch.inputs, batch_dim=case.batch_dim, clipping=clipping)
    proof = perexfx.verify(gm)
    assert proof.gradients == sum(p.requires_grad for p in gm.parameters()) - len(unreached(gm, case))
    assert proof.products
    assert proof.batch_size == batch.size


def unreached(gm: nn.Module, case: Case) -> set[str]:
    """Parameters that a backward gives no gradient."""
    batch = case.batch()
    case.loss(gm(*batch.inputs), batch.targets).backward()
    return {name for name, p in gm.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize(
    "options", [{"clipping": "per_layer"}, {"clipping": "automatic"}, {"clipping": torch.reciprocal}]
)
def test_every_kind_of_clipping(options: dict[str, Any]) -> None:
    assert "passes the clip factors" in str(perexfx.verify(two_layers(**options)))


def two_layers(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return perexfx.transform(model, torch.randn(4, 6), strategy="outer", **options)


def test_its_words() -> None:
    gm = two_layers()
    assert str(perexfx.verify(gm)).splitlines() == [
        "Proved on the dataflow of a step of 4 (72 operations, 89 edges), for every input and every loss of the "
        "examples' own outputs:",
        "1. Every path from an input to the gradient of any of 4 parameters passes the clip factors, in a product "
        "(4 mm, 2 mul). They enter it unchanged, and all that follows is linear.",
        "2. Every such path passes the norms, or what the parameter's own sites hand over (6 tensors of 2 sites), and "
        "all of that enters the norms that its factors are made of.",
        "3. Every path from a parameter to an output passes an operation of one of its sites, or is detached.",
    ]
    assert perexfx.verify(gm) == perexfx.verify(two_layers())
    assert "nothing is bounded" in str(perexfx.verify(two_layers(clip_norm=None)))


def test_it_leaves_everything_as_it_was() -> None:
    gm = two_layers()
    gm(torch.randn(7, 6)).sum().backward()
    state = gm.perexfx
    norms, factors, plan = state.norms, state.clip_factors, state.plan
    gradients = {name: p.grad.clone() for name, p in gm.named_parameters()}
    random = torch.get_rng_state()
    assert perexfx.verify(gm).batch_size == 7
    assert state.norms is norms
    assert state.clip_factors is factors
    assert state.plan is plan
    assert all(torch.equal(p.grad, gradients[name]) for name, p in gm.named_parameters())
    assert torch.equal(random, torch.get_rng_state())


# Steps that break a claim

Weighted = Callable[[Product, Tensor], Tensor]
honest: Weighted = Product.weighted_sum


def forgets_the_factors(self: Product, weights: Tensor) -> Tensor:
    return self.gradients().sum(0)


def adds_to_the_clipped_sum(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights) + 1e-30 * self.left.sum()


def is_not_linear_in_the_factors(self: Product, weights: Tensor) -> Tensor:
    return torch.maximum(self.gradients(), weights[:, None, None]).sum(0)


def squares_the_data_in(self: Product, weights: Tensor) -> Tensor:
    return torch.addcmul(honest(self, weights), self.left.sum(), self.right.sum())


def undoes_the_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights) / weights.mean()


def squares_the_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights * weights)


def scales_the_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, 100 * weights)


def gives_all_examples_the_sum(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights.sum().expand(len(weights)))


def takes_other_examples_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights.flip(0))


def rounds_what_is_clipped(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights).sign()


def pads_with_ones(self: Product, weights: Tensor) -> Tensor:
    return nn.functional.pad(honest(self, weights)[1:], (0, 0, 1, 0), value=1.0)


def adds_a_number(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights) + 1.0


def adds_a_constant(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights) + torch.ones(self.shape)


def adds_ones_where_data_says(self: Product, weights: Tensor) -> Tensor:
    total, where = honest(self, weights), (self.left[:, 0, 0, 0] > 0).long()
    return total.index_add(0, where, torch.ones(len(where), total.shape[1]))


def fills_a_tensor_in(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights).masked_fill(self.gradients().sum(0) > 0.1, torch.tensor(1e6))


def adds_ones_between_products(self: Product, weights: Tensor) -> Tensor:
    left = torch.cat([self.left[:, 0, 0] * weights[:, None], torch.ones(len(weights), 1)], 1)
    return self.right[:, 0, 0].T @ left[:, 1:]


def rounds_the_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights.bool().to(weights.dtype))


def overwrites_the_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights.clone().copy_(torch.ones(len(weights))))


def overwrites_one_factor(self: Product, weights: Tensor) -> Tensor:
    weights = weights.clone()
    weights[0] = 1.0
    return honest(self, weights)


def joins_factors_with_ones(self: Product, weights: Tensor) -> Tensor:
    return honest(self, torch.stack([weights, torch.ones(len(weights))])[1])


def reads_the_bits_of_factors(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights.view(torch.int32).to(weights.dtype))


def multiplies_the_factors_in_place(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights.mul_(100))


def chooses_factors_by_data(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights[self.left[:, 0, 0, 0].argsort()])


def divides_and_rounds(self: Product, weights: Tensor) -> Tensor:
    return torch.div(honest(self, weights), 1e-3, rounding_mode="floor")


def goes_through_integers(self: Product, weights: Tensor) -> Tensor:
    return honest(self, weights).to(torch.long).to(weights.dtype)


JOINS = r" joins what belongs to examples with the clip factors"
CHANGES = r" changes the clip factors before they are multiplied"
IS_NOT_LINEAR = r" changes clipped values, and is not known to be linear"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (adds_ones_where_data_says, "^index_add" + JOINS),
        (fills_a_tensor_in, "^masked_fill" + JOINS),
        (adds_ones_between_products, "^cat" + IS_NOT_LINEAR),
        (rounds_the_factors, "^_to_copy" + CHANGES),
        (overwrites_the_factors, "^The gradient of `0.weight` is not clipped"),
        (overwrites_one_factor, "^copy_" + CHANGES),
        (joins_factors_with_ones, "^stack" + CHANGES),
        (reads_the_bits_of_factors, "^view changes the clip factors in place"),
        (multiplies_the_factors_in_place, "^mul_ changes the clip factors in place"),
        (chooses_factors_by_data, "^index" + CHANGES),
        (divides_and_rounds, "^div" + IS_NOT_LINEAR),
        (goes_through_integers, "^_to_copy" + IS_NOT_LINEAR),
        (adds_a_number, r"^add changes clipped values, and is not known to be linear"),
        (adds_a_constant, r"^add changes clipped values, and is not known to be linear"),
        (undoes_the_factors, r"^mean changes the clip factors before they are multiplied.* The path: masked_fill -> "),
        (squares_the_factors, r"^mul changes the clip factors before they are multiplied"),
        (scales_the_factors, r"^mul changes the clip factors before they are multiplied"),
        (gives_all_examples_the_sum, r"^sum changes the clip factors before they are multiplied"),
        (takes_other_examples_factors, r"^flip changes the clip factors before they are multiplied"),
        (rounds_what_is_clipped, r"^sign changes clipped values, and is not known to be linear in them"),
        (pads_with_ones, r"^constant_pad_nd changes clipped values, and is not known to be linear"),
        (forgets_the_factors, r"^The gradient of `0.weight` is not clipped. The path: (input|gradient).* -> sum -> "),
        (adds_to_the_clipped_sum, r"^add joins .* not known to be a product of the two. The path: .* -> sum -> mul\.$"),
        (is_not_linear_in_the_factors, r"^maximum joins what belongs to examples with the clip factors"),
        (squares_the_data_in, r"^addcmul joins what belongs to examples with the clip factors"),
    ],
)
def test_a_gradient_that_is_not_clipped(monkeypatch: pytest.MonkeyPatch, broken: Weighted, message: str) -> None:
    gm = two_layers()
    monkeypatch.setattr(Product, "weighted_sum", broken)
    with pytest.raises(perexfx.ProofError, match=message):
        perexfx.verify(gm)


def test_factors_that_do_not_follow_from_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = two_layers()
    monkeypatch.setattr(clip_factors, "_flat", lambda norms, clip_norm: torch.ones_like(norms))
    with pytest.raises(perexfx.ProofError, match=r"^The clip factors do not depend on the norms"):
        perexfx.verify(gm)


def test_factors_of_another_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    clip_factors_of = clipped_sums.clip_factors_of

    def swapped(*given: Any) -> dict[str, Tensor]:
        factors = clip_factors_of(*given)
        return dict(zip(factors, reversed(factors.values()), strict=True))

    gm = two_layers(clipping="per_layer")
    assert perexfx.verify(gm)
    monkeypatch.setattr(clipped_sums, "clip_factors_of", swapped)
    with pytest.raises(perexfx.ProofError, match=r"`0.weight` is multiplied with clip factors that do not follow from"):
        perexfx.verify(gm)


def test_a_mask_that_fills_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def shows_where(self: Product, weights: Tensor) -> Tensor:
        return honest(self, weights).masked_fill(self.gradients().sum(0) > 0.1, 1e6)

    gm = two_layers()
    monkeypatch.setattr(Product, "weighted_sum", shows_where)
    with pytest.raises(perexfx.ProofError, match=r"^masked_fill joins what belongs to examples with the clip factors"):
        perexfx.verify(gm)


def test_equal_gradients_of_two_operands_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = nodes._squared_norms

    def forgets_a_bias(tape: Any, group: str) -> Tensor | None:
        found = {key: tape.observed.pop(key) for key in list(tape.observed) if key[1] == "bias_hh"}
        total = counted(tape, group)
        tape.held.update(found)
        return total

    gm = perexfx.transform(nn.LSTM(3, 4), torch.randn(5, 2, 3), batch_dim=1)
    assert perexfx.verify(gm)
    monkeypatch.setattr(nodes, "_squared_norms", forgets_a_bias)
    with pytest.raises(perexfx.ProofError, match="hands over for `bias_hh` is not in the norms"):
        perexfx.verify(gm)


def test_a_proof_goes_with_its_graph() -> None:
    gm = two_layers()
    perexfx.verify(gm)
    assert "Proved" in str(perexfx.report(gm))
    gm.recompile()
    assert "Proved" not in str(perexfx.report(gm))


def test_a_site_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_nothing(self: Outer, factors: Any) -> tuple[Tensor, Factors]:
        return factors.left.new_zeros(len(factors.left)), factors

    gm = two_layers()
    monkeypatch.setattr(Outer, "squared_norms", of_nothing)
    message = r"^What site `0` hands over for `weight` is not in the norms. The path: clone \(handed over by site `0`\)"
    with pytest.raises(perexfx.ProofError, match=message):
        perexfx.verify(gm)


def test_a_site_whose_norms_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    squared_norms = Outer.squared_norms

    def of_nothing(self: Outer, factors: Any) -> tuple[Tensor, Factors]:
        found, held = squared_norms(self, factors)
        return found.zero_(), held

    gm = two_layers()
    monkeypatch.setattr(Outer, "squared_norms", of_nothing)
    with pytest.raises(perexfx.ProofError, match=r"is not in the norms"):
        perexfx.verify(gm)


def test_factors_that_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = two_layers()
    monkeypatch.setattr(clip_factors, "_flat", lambda norms, clip_norm: norms.clone().fill_(1.0))
    with pytest.raises(perexfx.ProofError, match=r"^The clip factors do not depend on the norms"):
        perexfx.verify(gm)


def test_one_factor_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_left(self: Outer, factors: Any) -> tuple[Tensor, Factors]:
        return factors.left.square().sum((1, 2, 3)), factors

    gm = two_layers()
    monkeypatch.setattr(Outer, "squared_norms", of_the_left)
    with pytest.raises(perexfx.ProofError, match="is not in the norms"):
        perexfx.verify(gm)


def test_data_that_no_site_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Linear.backward
    kept: list[Tensor] = []

    def keeps(self: Linear, call: Any) -> Any:
        kept.append(call.arguments["input"])
        return honest(self, call)

    def smuggles(self: Product, weights: Tensor) -> Tensor:
        return (weights @ kept[0].sum(1, keepdim=True)) * torch.ones(self.shape)

    gm = two_layers()
    monkeypatch.setattr(Linear, "backward", keeps)
    monkeypatch.setattr(Product, "weighted_sum", smuggles)
    with pytest.raises(
        perexfx.ProofError, match=r"^The gradient of `0.weight` has more in it than its sites hand over"
    ):
        perexfx.verify(gm)


def test_a_gradient_of_another_site(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = clipped_sums.add_pulled

    def swapped(tape: Any, key: Any, value: Tensor, pull_back: Any, sums: dict[str, Tensor]) -> None:
        honest(tape, ("0" if key[0] == "2" else "2", key[1]), value, pull_back, sums)

    torch.manual_seed(0)
    gm = perexfx.transform(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)), torch.randn(4, 5))
    monkeypatch.setattr(clipped_sums, "add_pulled", swapped)
    with pytest.raises(perexfx.ProofError, match="has more in it than its sites hand over"):
        perexfx.verify(gm)


def last_linear(gm: Any) -> Any:
    return next(node for node in gm.graph.nodes if node.op == "output").args[0]


def test_a_parameter_used_outside_of_its_sites() -> None:
    gm = two_layers()
    bias = next(node for node in gm.graph.nodes if node.name == "perexfx_clipped_2_bias")
    output = last_linear(gm)
    with gm.graph.inserting_after(output):
        added = gm.graph.call_function(operator.add, (output, bias))
    output.replace_all_uses_with(added, lambda user: user is not added)
    message = r"^Parameter `2.bias` is used where no site is. The path: parameter `2.bias` -> add \(`add`\)\.$"
    with pytest.raises(perexfx.ProofError, match=message):
        perexfx.verify(gm)


def test_a_parameter_that_avoids_the_clip_node() -> None:
    gm = two_layers()
    output = last_linear(gm)
    with gm.graph.inserting_after(output):
        read = gm.graph.get_attr("2.bias")
    with gm.graph.inserting_after(read):
        added = gm.graph.call_function(torch.mul, (output, read))
    output.replace_all_uses_with(added, lambda user: user is not added)
    with pytest.raises(perexfx.ProofError, match=r"^add joins .* The path: gradient of an output -> mul -> sum\.$"):
        perexfx.verify(gm)


# Arguments


def test_without_a_plan_or_a_transform() -> None:
    with pytest.raises(perexfx.ArgumentError, match="There is no plan yet"):
        perexfx.verify(perexfx.transform(nn.Linear(3, 2)))
    with pytest.raises(perexfx.ArgumentError, match=r"should come from `perexfx.transform`. Found Linear"):
        perexfx.verify(nn.Linear(3, 2))


def test_a_batch_without_examples() -> None:
    gm = two_layers()
    gm(torch.zeros(0, 6))
    with pytest.raises(perexfx.ArgumentError, match="The last batch had no examples"):
        perexfx.verify(gm)


def test_what_reads_numbers_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = two_layers()
    monkeypatch.setattr(Product, "weighted_sum", lambda self, weights: honest(self, weights) * float(weights.max()))
    with pytest.raises(perexfx.CaptureError, match=r"reads the value of a tensor, .* number out of a tensor"):
        perexfx.verify(gm)


def test_what_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Product, weights: Tensor) -> Tensor:
        raise RuntimeError("no such factors")

    gm = two_layers()
    monkeypatch.setattr(Product, "weighted_sum", fails)
    with pytest.raises(perexfx.CaptureError, match=r"cannot be followed. It fails .*: no such factors. Run the model"):
        perexfx.verify(gm)


def test_a_step_without_gradients() -> None:
    gm = two_layers()
    gm.requires_grad_(False)
    assert str(perexfx.verify(gm)).startswith("In a step of 4 no parameter gets a gradient")


def test_inference_mode() -> None:
    gm = two_layers()
    with torch.inference_mode():
        assert "Proved" in str(perexfx.verify(gm))
