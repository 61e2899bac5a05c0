"""Graph modules as models: those of torch.fx, those that are captured already, and what copies keep."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, fx, nn

import perexfx
from perexfx.capture.captured import Captured
from perexfx.capture.forward import capture
from perexfx.capture.graph_module import CapturedModule, twin_of
from tests.support.losses import squares
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2)).double().eval()


BATCH = Batch((torch.randn(5, 3, dtype=torch.float64),), torch.randn(5, dtype=torch.float64))


def captured(model: nn.Module) -> CapturedModule:
    found = capture(model, {"input": BATCH.inputs[0]})
    return CapturedModule.around(twin_of(model, found.constants), found)


MODELS = {
    "traced": lambda: fx.symbolic_trace(net()),
    "inside another": lambda: nn.Sequential(fx.symbolic_trace(net())),
    "captured": lambda: captured(net()),
    "captured, inside another": lambda: nn.Sequential(captured(net())),
    "captured twice": lambda: captured(captured(net())),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_module_is_a_model(name: str) -> None:
    model = MODELS[name]()
    truth = one_at_a_time(model, BATCH, squares)
    norms = norms_of(truth)
    clip_norm = float(norms.median())
    gm = perexfx.transform(model, BATCH.inputs, clip_norm=clip_norm)
    found = train_step(gm, BATCH, squares)
    assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, name)
    assert_close(found, weighted(truth, (clip_norm / norms).clamp(max=1) / BATCH.size), 1e-9, name)
    assert copy.deepcopy(gm)(*BATCH.inputs).shape == (5, 2)


def test_an_exported_root_has_a_hook_and_a_way_out() -> None:
    exported = torch.export.export(net(), BATCH.inputs).module()
    with pytest.raises(perexfx.CaptureError, match="make the model a submodule of another"):
        perexfx.transform(exported, BATCH.inputs)
    with pytest.raises(perexfx.RefusedError, match="the graph does not hold for every batch size"):
        perexfx.transform(nn.Sequential(exported), BATCH.inputs)
    batches = {0: torch.export.Dim("examples", min=2, max=64)}
    model = nn.Sequential(torch.export.export(net(), BATCH.inputs, dynamic_shapes=(batches,)).module())
    gm = perexfx.transform(model, BATCH.inputs)
    train_step(gm, BATCH, squares)
    torch.testing.assert_close(gm.perexfx.norms, norms_of(one_at_a_time(net(), BATCH, squares)))


def test_a_captured_module_keeps_what_its_model_had() -> None:
    model = net()
    model.note = {"kept": 1}  # pyright: ignore[reportAttributeAccessIssue] (as people do)
    module = captured(model)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (module, copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert other.note == {"kept": 1}
        assert torch.equal(other(*BATCH.inputs), model(*BATCH.inputs))
    assert next(module.parameters()) is next(model.parameters())
    found = capture(module)
    assert found.graph is not module.graph
    assert [node.name for node in found.graph.nodes] == [node.name for node in module.graph.nodes]


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        x = self.linear(x)
        if self.training:
            x = x.tanh()
        return x.sin() if flag else x


def test_calls_that_the_graph_does_not_hold_for_are_errors() -> None:
    model = _Branches()
    x = torch.randn(4, 3)
    found = capture(model, {"x": x})
    assert isinstance(found, Captured)
    module = CapturedModule.around(twin_of(model, found.constants), found)
    torch.testing.assert_close(module(x), model(x))
    with pytest.raises(perexfx.ArgumentError, match="Argument `flag` was False"):
        module(x, flag=True)
    module.eval()
    with pytest.raises(perexfx.ModeError, match="computes something else in eval mode"):
        module(x)


def test_a_compiled_model_is_clipped() -> None:
    """What `compile` leaves on a module would run in the place of the graph."""
    model = net()
    model.compile(backend="eager")
    for inputs in (BATCH.inputs, None):
        gm = perexfx.transform(model, inputs, clip_norm=1e-3)
        found = train_step(gm, BATCH, squares)
        assert float(torch.stack([value.norm() for value in found.values()]).norm()) <= 1e-3 * (1 + 1e-9)
        torch.testing.assert_close(gm.perexfx.norms, norms_of(one_at_a_time(net(), BATCH, squares)))


def test_a_forward_of_the_instance_is_refused() -> None:
    model = net()
    old = model.forward
    model.forward = lambda x: old(x) * 2
    with pytest.raises(perexfx.CaptureError, match="has a `forward` of its own beside that of its class"):
        perexfx.transform(model, BATCH.inputs)
    assert perexfx.transform(nn.Sequential(model), BATCH.inputs)(*BATCH.inputs).shape == (5, 2)
