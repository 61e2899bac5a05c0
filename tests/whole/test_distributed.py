"""A transformed module under DistributedDataParallel: two processes with half a batch each."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing import spawn

import perexfx


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    gm = perexfx.transform(model, clip_norm=0.1)
    own = slice(4 * rank, 4 * rank + 4)
    distributed = nn.parallel.DistributedDataParallel(gm)
    F.cross_entropy(distributed(x[own]), y[own]).backward()
    averaged = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    F.cross_entropy(gm(x), y).backward()
    for ours, parameter in zip(averaged, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-12, atol=1e-12)
    dist.destroy_process_group()


def test_gradients_are_averaged_as_for_the_model(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=2)
