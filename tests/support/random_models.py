"""Random models, and whether perexfx answers them rightly: exactly, or with a refusal.

`python -m tests.support.random_models --count 1000 --seed 0` tries many and prints the source of each that fails.
"""

from __future__ import annotations

import argparse
import math
import time
import traceback
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import perexfx
from perexfx.capture.forward import CaptureError
from tests.support.oracle import Batch, assert_close, norms_of, one_at_a_time, train_step, weighted
from tests.support.random_programs import Program, generate

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        kind: "exact", "refused", "invalid" (the model itself does not work on one example, or its gradients are
            beyond float64), or "wrong": a wrong number, or an error that is not one of perexfx's own.
        mixes: Whether the model combines examples, by its own outputs.
        detail: What was found.
    """

    kind: str
    mixes: bool = False
    detail: str = ""


class NoAnswerError(Exception):
    """There is no right answer to compare with."""


def judge(program: Program) -> Outcome:
    """Transforms a program and compares a step with one example at a time, at several numbers of examples."""
    model = program.build()
    mixes = False
    try:
        _run(program, program.n)
        mixes = any(_mixes(program, n) for n in (program.n, *program.others, 3) if n)
    except NoAnswerError as error:
        return Outcome("invalid", mixes, str(error))
    try:
        norms = norms_of(_truth(program.build(), program, program.batch(program.n)))
        clip_norm = float(norms.median()) if float(norms.median()) > 1e-6 else 1.0
        gm = _transformed(model, program, clip_norm)
        for n in (program.n, *program.others):
            _compare(gm, program, n, clip_norm)
    except perexfx.PerexError as error:
        return Outcome("refused", mixes, f"{type(error).__name__}: {error}")
    except NoAnswerError as error:
        return Outcome("invalid", mixes, str(error))
    except Exception:
        return Outcome("wrong", mixes, traceback.format_exc())
    return Outcome("exact", mixes)


def _transformed(model: nn.Module, program: Program, clip_norm: float) -> nn.Module:
    inputs = None if program.capture == "late" else program.batch(program.n).inputs
    transform = partial(
        perexfx.transform,
        model,
        inputs,
        clip_norm=clip_norm,
        loss_reduction=program.reduction,
        batch_dim=program.batch_dim,
    )
    with _only(program.capture):
        try:
            gm = transform(strategy=program.strategy)
            gm(*program.batch(program.n).inputs)  # without example inputs it is now that strategies are chosen
            return gm
        except perexfx.StrategyError:
            return transform()


def _only(capture: str) -> AbstractContextManager[Any]:
    """Export, though the model could be traced."""
    if capture != "exported":
        return nullcontext()
    return patch("perexfx.capture.forward._traced", side_effect=CaptureError("not traced, for this test."))


def _run(program: Program, n: int) -> Any:
    """The outputs of a model that has not run before: some change as they run."""
    batch = program.batch(n)
    try:
        with torch.no_grad():
            output = program.build()(*batch.inputs)
            program.loss(output, batch.targets)
    except Exception as error:
        raise NoAnswerError(f"the model fails on {n} examples: {type(error).__name__}: {error}") from None
    return [output] if isinstance(output, Tensor) else list(output)


def _mixes(program: Program, n: int) -> bool:
    """Whether the outputs for a batch are others than those for its examples one at a time."""
    batch = program.batch(n)
    try:
        together = _run(program, n)
    except NoAnswerError:
        return True
    for i in range(n):
        try:
            with torch.no_grad():
                alone = program.build()(*batch.example(i).inputs)
        except Exception as error:
            raise NoAnswerError(f"the model fails on one example: {type(error).__name__}: {error}") from None
        for a, b in zip(together, [alone] if isinstance(alone, Tensor) else alone, strict=True):
            row, own = a.reshape(n, -1)[i], b.reshape(-1)
            if row.shape != own.shape or not torch.allclose(row, own, rtol=1e-9, atol=1e-9):
                return True
    return False


def _truth(model: nn.Module, program: Program, batch: Batch) -> dict[str, Tensor]:
    """Gradients one example at a time. Raises: NoAnswerError, if they are beyond float64."""
    try:
        gradients = one_at_a_time(model, batch, program.loss)
    except Exception as error:
        raise NoAnswerError(f"the model fails on one example: {type(error).__name__}: {error}") from None
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    if not math.isfinite(largest) or largest > 1e12:
        raise NoAnswerError("its gradients are not finite")
    return gradients


def _compare(gm: Any, program: Program, n: int, clip_norm: float) -> None:
    """One step on n examples, against them one at a time."""
    batch, works = program.batch(n), True
    try:
        expected = _run(program, n)
    except NoAnswerError:
        works = False
    gradients = _truth(program.build(), program, batch)
    norms = norms_of(gradients)
    try:
        found = train_step(gm, batch, program.loss)
    except perexfx.PerexError:
        if n == program.n:
            raise
        return
    except Exception:
        if works:
            raise
        return
    if not n:
        assert not any(g.any() for g in found.values()), "gradients of no examples"
        return
    assert works, "it gives an answer where the model fails"
    factors = (clip_norm / norms).clamp(max=1) / (n if program.reduction == "mean" else 1)
    output = gm(*batch.inputs)
    floor = torch.tensor([1e-3], dtype=torch.float64)  # what is zero because its parts cancel has their rounding
    try:
        for a, b in zip([output] if isinstance(output, Tensor) else output, expected, strict=True):
            found_output, output_expected = ({"output": torch.cat([x.flatten(), floor])} for x in (a, b))
            assert_close(found_output, output_expected, TOLERANCE, f"n = {n}")
        found_norms = {"norms": torch.cat([gm.perexfx.norms, floor])}
        assert_close(found_norms, {"norms": torch.cat([norms, floor])}, TOLERANCE, f"n = {n}")
        everything = weighted(gradients, factors)
        assert_close(found | {"": floor * 10}, everything | {"": floor * 10}, TOLERANCE, f"n = {n}")
    except AssertionError:
        _refuse_unstable(program, batch, gradients)
        raise


def _refuse_unstable(program: Program, batch: Batch, gradients: dict[str, Tensor]) -> None:
    """Raises: NoAnswerError, if a rounding error in the weights changes gradients by more than is compared."""
    moved = program.build()
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1 + 1e-15 * torch.randn_like(parameter))
    other = _truth(moved, program, batch)
    scale = max(float(g.abs().max()) for g in gradients.values())
    if any(float((other[name] - g).abs().max()) > 1e-11 * scale for name, g in gradients.items() if g.numel()):
        raise NoAnswerError("its gradients change with a rounding error")


def main() -> None:
    """Tries many, and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next has the next number")
    parser.add_argument("--show", default="", help='print these too, as in "refused invalid"')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, ...]] = Counter()
    start = time.perf_counter()
    for done in range(1, arguments.count + 1):
        seed = arguments.seed + done - 1
        program = generate(Random(seed))
        outcome = judge(program)
        counts["mixing" if outcome.mixes else "independent", outcome.kind] += 1
        if outcome.kind in ("wrong", *arguments.show.split()):
            print(f"==== seed {seed}: {outcome.kind}\n{program}\n{outcome.detail}\n", flush=True)
        if done % 250 == 0 or done == arguments.count:
            found = ", ".join(f"{count} {kind} ({mixing})" for (mixing, kind), count in sorted(counts.items()))
            print(f"{done} programs in {time.perf_counter() - start:.0f} s: {found}", flush=True)


if __name__ == "__main__":
    main()
