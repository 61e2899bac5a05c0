"""Whether what one call leaves for a backward can be clipped.

Promises: where it cannot, that is an error before anything is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import nn

from perexfx.ir.errors import ModeError


def check_trains(owner: nn.Module, frozen: Iterable[str]) -> None:
    """That what this call leaves for a backward can be clipped.

    Args:
        owner: The transformed module.
        frozen: Names of the parameters that were not trainable when the model was transformed.

    Raises:
        ModeError: Autocast is on, or one of them is trainable now.
    """
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        raise ModeError(
            "Autocast is on around the transformed model: its gradients would be of mixed precision, which perexfx "
            "does not cover. Switch it off, or convert the model to the dtype you want."
        )
    for name in frozen:
        if operator.attrgetter(name)(owner).requires_grad:
            raise ModeError(
                f"Parameter `{name}` was frozen when the model was transformed and is trainable now: its gradient "
                "would not be clipped. Transform the model again, or freeze it."
            )


__all__ = ["check_trains"]
