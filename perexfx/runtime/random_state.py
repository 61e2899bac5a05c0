"""Random numbers of runs on the side: who runs a model once more leaves the generators as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_state_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """The generators of the CPU, and of the accelerators among some devices, are put back afterwards."""
    accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
    kind = next(iter(accelerators)).type if accelerators else "cuda"
    with torch.random.fork_rng([device for device in accelerators if device.type == kind], device_type=kind):
        yield
