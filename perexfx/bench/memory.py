"""How memory is measured: what one run allocates, and the peak of a process of its own."""

from __future__ import annotations

import gc
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from perexfx.bench.measure import WARM_UP
from perexfx.bench.steps import Setup, Step, set_up
from perexfx.bench.workloads import Workload


def peak_allocation(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at once during a run, on top of what is there before it.

    As torch's allocators record them: what a library underneath takes for itself is not among them. The run should
    free nothing that was there before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines about itself for every run
    with _collector_paused(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results if recorded.profiler else None
    assert results is not None
    changes = [
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]  # missing in torch's stubs
        for event in results.events()
        if event.name() == "[memory]"
    ]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without garbage collections: they free what was there before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def peak_of_process(workload: Workload, make: Callable[[Setup], Step], device: torch.device) -> int:
    """Peak bytes of a fresh process that takes a few steps: resident ones, or on a GPU those of torch's allocator.

    As in any training loop there is an optimizer: torch's own load a good part of torch, 70 MB.

    Args:
        workload: What it sets up.
        make: Makes the step; a function of a module, or a partial of one.
        device: What the step runs on.

    Raises: What the step raises there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_after_steps, workload, make, device).result()


def _peak_after_steps(workload: Workload, make: Callable[[Setup], Step], device: torch.device) -> int:
    warnings.simplefilter("ignore")  # they have been seen where the step was timed
    setup = set_up(workload, device)
    step, optimizer = make(setup), torch.optim.SGD(setup.parameters, lr=0.0)
    for _ in range(WARM_UP):
        step()
        optimizer.step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


def _peak_resident() -> int:
    """Bytes. The system's own count of a process starts with what its parent had; `VmHWM` starts anew."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
