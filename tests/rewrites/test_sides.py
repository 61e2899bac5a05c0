"""The draw of a reduced model."""

from __future__ import annotations

import torch
from torch import fx, nn

from perexfx.capture import capture
from perexfx.rewrites.sides import Sides


def test_sides_are_drawn_in_training_and_alternate_in_evaluation() -> None:
    sides = Sides(500, 2)
    torch.manual_seed(0)
    first, second = sides(), sides()
    assert first.shape == (500, 2)
    assert set(first.flatten().tolist()) == {0, 1}
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(sides(), first)
    sides.eval()
    assert sides()[:3].tolist() == [[0, 0], [1, 1], [0, 0]]


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sides = Sides(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.sides()[0, 0]


def test_it_is_one_node_of_a_graph() -> None:
    (node,) = [node for node in capture(_Around()).graph.nodes if node.op == "call_module"]
    assert node.target == "sides"
    assert isinstance(node, fx.Node)
