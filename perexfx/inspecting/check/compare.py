"""Comparing: what a transformed module gave against what each example gives alone.

Promises: an error is relative to the numbers that it is an error of, so that one tolerance fits all; what is missing
has an infinite error. The clip factors are computed anew, from the reference's norms.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perexfx.inspecting.check.reference import Alone, rows_of
from perexfx.inspecting.check.result import ParameterVerdict, Verdict
from perexfx.ir.layout import Layout
from perexfx.runtime import AUTOMATIC_STABILITY, Runtime

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative errors that are taken for rounding, by dtype: what deep networks lose to it, with room to spare, and well
below what a wrong formula is off by. In float64 there is room for both."""

PARTS = 0.1
"""A gradient's error may be relative to this share of the largest entry of the example's whole gradient: where it is
small because its parts cancel, it has the rounding of the parts."""

EXAMPLES = 1e-3
"""And to this share of the largest of all examples: one may have no gradient at all."""


def wide(value: Tensor) -> Tensor:
    """In float64, on the CPU: some accelerators have none."""
    return value.detach().to("cpu", torch.float64)


def relative(difference: Tensor, scale: Tensor) -> Tensor:
    """`difference / scale`; zero where there is none, infinite where either is not a number."""
    errors = torch.where(difference == 0, 0.0, difference / scale)
    return torch.where(errors.isnan(), math.inf, errors)


def largest(rows: Tensor) -> Tensor:
    """The largest entry of each row, `[n, m]` to `[n]`."""
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(rows.shape[0])


def change(before: Tensor, after: Tensor) -> Tensor:
    """The difference of each row in units of the largest entry of all, `[n, m]` to `[n]`."""
    found, wanted = wide(after), wide(before)
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    scale = largest(torch.where(wanted.isfinite(), wanted, 0.0).reshape(1, -1))
    return relative(largest(torch.where(same, 0.0, found - wanted)), scale)


def structures_differ(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """In what two outputs differ besides numbers; "" where they do not."""
    ours, theirs = ({name: list(value.shape) for name, value in output.items()} for output in (found, wanted))
    return "" if ours == theirs else f"the transformed module returns shapes {ours}, the reference {theirs}"


def compare_outputs(
    together: Mapping[str, Tensor], alone: Alone, layouts: Sequence[Layout | None], tolerance: float
) -> Verdict:
    """The outputs of all examples together against those of each alone."""
    worst, reason = 0.0, ""
    for (name, value), layout in zip(together.items(), layouts, strict=True):
        found = value.reshape(1, -1) if layout is None else rows_of(value, layout)
        for i, output in enumerate(alone.outputs):
            single = output.get(name)
            if single is None or single.numel() != found[0].numel():
                shape = None if single is None else list(single.shape)
                return Verdict("outputs", math.inf, f"`{name}` of example {i} alone is of shape {shape}")
            wanted = single.reshape(1, -1) if layout is None else rows_of(single, layout)
            error = float(change(wanted, found if layout is None else found[i : i + 1]))
            if error > max(worst, tolerance):
                reason = f"`{name}` of example {i} is another alone"
            worst = max(worst, error)
    return Verdict("outputs", worst, reason)


def compare_losses(together: Tensor, alone: Alone, reduction: str, tolerance: float) -> Verdict:
    """Whether the loss joins the examples as it was said to."""
    losses = wide(alone.losses)
    joined = {"mean": losses.mean(), "sum": losses.sum()}
    scale = {"mean": losses.abs().mean(), "sum": losses.abs().sum()}
    errors = {kind: float(relative((wide(together) - joined[kind]).abs(), scale[kind])) for kind in joined}
    if errors[reduction] <= tolerance:
        return Verdict("loss", errors[reduction])
    fits = [kind for kind, error in errors.items() if error <= tolerance]
    advice = f'pass `loss_reduction="{fits[0]}"` to `transform`' if fits else "one example's loss depends on others"
    return Verdict("loss", errors[reduction], f"it is not the {reduction} of the examples' own losses: {advice}")


@dataclass(frozen=True)
class Truth:
    """The reference in float64.

    Attributes:
        gradients: Parameter name -> `[n, m]`.
        scale: Largest entry of each example's whole gradient, `[n]`.
        finite: Which examples have finite gradients, `[n]`.
    """

    gradients: dict[str, Tensor]
    scale: Tensor
    finite: Tensor

    @classmethod
    def of(cls, alone: Alone) -> Truth:
        """From what each example gave alone."""
        gradients = {name: wide(g.flatten(1) if g.dim() > 1 else g[:, None]) for name, g in alone.gradients.items()}
        scale = torch.stack([largest(rows) for rows in gradients.values()]).amax(0)
        return cls(gradients, scale, scale.isfinite())

    @property
    def floor(self) -> Tensor:
        """The least that an example's errors are relative to, `[n]`."""
        overall = self.scale[self.finite].max() if bool(self.finite.any()) else self.scale.new_ones(())
        return torch.maximum(PARTS * self.scale, EXAMPLES * overall)

    def norms(self, names: Collection[str] | None = None) -> Tensor:
        """Norm of each example's gradient over some parameters, or all, `[n]`."""
        chosen = [rows for name, rows in self.gradients.items() if names is None or name in names]
        return torch.stack([torch.zeros_like(self.scale), *(rows.square().sum(1) for rows in chosen)]).sum(0).sqrt()


def compare_norms(runtime: Runtime, truth: Truth, tolerance: float) -> Verdict:
    """Norms, and clip factors, of the last backward against those of the reference."""
    results = runtime.results
    assert results.norms is not None
    assert results.clip_factors is not None
    found, wanted = wide(results.norms), truth.norms()
    overall = wanted[truth.finite].max() if bool(truth.finite.any()) else wanted.new_ones(())
    errors = relative((found - wanted).abs(), torch.maximum(wanted, EXAMPLES * overall))
    errors = torch.where(truth.finite, errors, torch.where(found.isfinite(), math.inf, 0.0))
    error = float(errors.max())
    if error > tolerance:
        example = int(errors.argmax())
        return Verdict("norms", error, f"example {example} has {found[example]:.6g}, and {wanted[example]:.6g} alone")
    rows = torch.stack(list(factors_of(runtime, truth).values()))
    differences = relative((wide(results.clip_factors) - rows).abs(), rows).amax(0)
    factor_error = float(differences.max())
    reason = f"the clip factor of example {int(differences.argmax())} is wrong" if factor_error > tolerance else ""
    return Verdict("norms", max(error, factor_error), reason)


def graded(norms: Tensor) -> Tensor:
    """Factors that differ from example to example."""
    return torch.ones_like(norms).cumsum(0) / max(len(norms), 1)


def factors_of(runtime: Runtime, truth: Truth) -> dict[str, Tensor]:
    """Group -> the factors `[n]` that the reference's norms give."""
    settings, norms, groups = runtime.settings, truth.norms(), runtime.sites.groups
    C = math.inf if settings.clip_norm is None else settings.clip_norm
    factors = {}
    for group, sites in groups.items():
        if callable(settings.clipping):
            found = graded(norms)
        elif settings.clipping == "per_layer":
            own = truth.norms({name for site in sites for name in site.parameters})
            found = (C / math.sqrt(len(groups)) / own).clamp(max=1)
        elif settings.clipping == "automatic" and settings.clip_norm is not None:
            found = C / (norms + AUTOMATIC_STABILITY)
        else:
            found = (C / norms).clamp(max=1)
        factors[group] = torch.where(truth.finite, found, 0.0)
    return factors


def compare_parameters(
    runtime: Runtime, each: Mapping[str, Tensor], sums: Mapping[str, Tensor], truth: Truth, tolerance: float
) -> tuple[ParameterVerdict, ...]:
    """Per-example gradients of the last backward, and what it adds to `.grad`, against the reference.

    The sums are those with the factors that the backward had, which `compare_norms` judges: a wrong norm is not the
    fault of every parameter.

    Args:
        runtime: Of the transformed module.
        each: Parameter name -> each example's gradient, as the step found it.
        sums: Parameter name -> what the backward adds to `.grad`.
        truth: What the reference gives.
        tolerance: The largest relative error taken for rounding.
    """
    assert runtime.results.clip_factors is not None
    n, sites = len(truth.scale), runtime.sites
    used = wide(runtime.results.clip_factors).reshape(-1, n).expand(len(sites.groups), n)
    factors = dict(zip(sites.groups, used, strict=True))
    groups = {name: site.group for site in reversed(sites.sites) for name in site.parameters}
    joined = {}
    for name, rows in truth.gradients.items():
        weights = factors[groups[name]] if name in groups else torch.ones_like(truth.scale)
        weights = weights / n if runtime.settings.loss_reduction == "mean" else weights
        joined[name] = torch.where(truth.finite[:, None], rows, 0.0).mul(weights[:, None]).sum(0)
    overall = torch.stack([largest(value[None])[0] for value in joined.values()]).max()
    verdicts = []
    for name, rows in truth.gradients.items():
        own = each.get(name)
        found = torch.zeros_like(rows) if own is None else wide(own).reshape(rows.shape)
        differences = torch.where(truth.finite[:, None], (found - rows).abs(), 0.0)
        errors = relative(largest(differences), torch.maximum(largest(rows), truth.floor))
        difference = largest((wide(sums[name]).flatten() - joined[name])[None])[0]
        in_grad = float(relative(difference, torch.maximum(largest(joined[name][None])[0], PARTS * overall)))
        reason = ""
        if float(errors.max()) > tolerance:
            reason = f"the gradient of example {int(errors.argmax())} is {'missing' if own is None else 'wrong'}"
        elif in_grad > tolerance:
            reason = "`.grad` is not the clipped sum"
        verdicts.append(ParameterVerdict(name, float(errors.max()), reason, in_grad))
    return tuple(verdicts)
