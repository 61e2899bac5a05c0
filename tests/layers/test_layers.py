"""Every layer of `torch.nn` that has parameters, through both captures, and the table of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import perexfx
from perexfx.capture.forward import CaptureError
from tests.support.cases import Case
from tests.support.layers import LAYERS, NOT_LAYERS
from tests.support.marks import needs_kernels
from tests.support.oracle import assert_close, norms_of, one_at_a_time, train_step, weighted
from tests.support.supported import PAGE, page


@pytest.mark.parametrize("capture", ["traced", "exported"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda case: case.name)
def test_layer_is_exact(layer: Case, capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise CaptureError("not this one.")

    monkeypatch.setattr(f"perexfx.capture.forward.{'_traced' if capture == 'exported' else '_exported'}", fails)
    model = layer.build()
    gm = perexfx.transform(model, layer.batch().inputs, batch_dim=layer.batch_dim, clip_norm=0.5)
    for n in (4, 1, 6):
        batch = layer.batch(n)
        gradients = one_at_a_time(model, batch, layer.loss)
        norms = norms_of(gradients)
        expected = weighted(gradients, (0.5 / norms).clamp(max=1) / n)
        assert_close(train_step(gm, batch, layer.loss), expected, 1e-9, layer.name)
        assert_close({"norms": gm.perexfx.norms}, {"norms": norms}, 1e-9, layer.name)


def test_every_layer_of_torch_is_here() -> None:
    found = {type(module).__name__ for case in LAYERS for module in case.build().modules()}
    for name, kind in vars(nn).items():
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and _makes_parameters(kind):
            is_lazy = issubclass(kind, nn.modules.lazy.LazyModuleMixin)  # becomes what it stands for when first called
            assert name in found or name in NOT_LAYERS or is_lazy, name


def _makes_parameters(kind: type[nn.Module]) -> bool:
    if kind in (nn.TransformerEncoder, nn.TransformerDecoder):  # are given their layers
        return True
    made = [vars(cls).get("__init__") for cls in kind.__mro__ if cls is not nn.Module]
    source = "".join(inspect.getsource(init) for init in made if inspect.isfunction(init))
    return "Parameter(" in source or "Layer(" in source


def test_what_selects_examples_by_their_targets_is_refused() -> None:
    model = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3])
    with pytest.raises(perexfx.PerexError, match="AdaptiveLogSoftmaxWithLoss"):
        perexfx.transform(model, (torch.randn(3, 4), torch.randint(0, 9, (3,))))


@needs_kernels
def test_the_table_is_current() -> None:
    """`python -m tests.support.supported` writes it."""
    assert PAGE.read_text() == page()
