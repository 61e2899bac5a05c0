"""The check that anyone can run: a transformed module against one example at a time.

Promises: everything is left as it was: `.grad`, modes, buffers, random number generators, and what `gm.perexfx` holds.
Nothing is taken from the static analysis but where outputs carry examples; that examples do not mix is seen from what
the forward does.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from perexfx.capture import modes_kept
from perexfx.inspecting.check.compare import (
    TOLERANCES,
    Truth,
    compare_losses,
    compare_norms,
    compare_outputs,
    compare_parameters,
    graded,
    structures_differ,
)
from perexfx.inspecting.check.forwards import Forwards
from perexfx.inspecting.check.mixing import find_mixing
from perexfx.inspecting.check.reference import (
    BuiltInLoss,
    Call,
    gradients_of,
    named_tensors,
    one_at_a_time,
    output_tensors,
)
from perexfx.inspecting.check.result import CheckResult, Verdict
from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import GivenInputs, bind_inputs
from perexfx.ir.layout import Layout
from perexfx.runtime import PerExample, Runtime, StepOptions, random_state_kept, runtime_of
from perexfx.steps import LossFunction


def check(
    gm: nn.Module,
    inputs: GivenInputs,
    *,
    model: nn.Module | None = None,
    loss_fn: LossFunction | None = None,
    targets: Any = None,
    examples: int = 4,
    tolerance: float | None = None,
) -> CheckResult:
    """Whether a transformed module gives, on these inputs, what one example at a time gives by plain autograd.

    Compared are the outputs, the loss, every example's gradient of every parameter, the norms and clip factors, and
    what one backward adds to `.grad`. Then each example's inputs are replaced in turn by those of the next one: the
    outputs of the others may not move. The strategies are those that the planner chooses for the whole batch.

    Random forwards (dropout) cannot be compared: where two equal calls differ, eval mode is checked instead, if the
    graph holds for it. `result.mode` says which it was.

    Errors are relative to the largest entry of a parameter's gradient for an example, or to a tenth of the largest of
    that example's whole gradient: one that is small because its parts cancel has the rounding of the parts. The default
    tolerances are 1e-9 in float64 and 1e-4 in float32, where correct gradients of deep networks differ by some 1e-6;
    less where fewer digits are computed with. So the check is sharpest in float64:
    `perexfx.check(copy.deepcopy(gm).double(), x.double())`.

    A `clipping` function of the user's is not called, as it may learn from what it sees: other factors stand in.

    Args:
        gm: From `perexfx.transform`.
        inputs: As for `perexfx.transform`.
        model: What `gm` was made from. With it the capture is checked too: it is the reference, with the parameters,
            buffers and modes of `gm`. Without, the captured graph is.
        loss_fn: `(output, targets) -> scalar`, joining the examples as `loss_reduction` says. None: a curved function
            of everything that an output holds.
        targets: For `loss_fn`: a tensor, or a pytree of tensors, with the examples on axis 0 or on `batch_dim`.
        examples: How many examples are taken, from the front. For each, gradients of all parameters are held in
            float64, and twice in their own dtype.
        tolerance: The largest relative error taken for rounding; None: by the dtype.

    Returns:
        What was found. It is true where everything agrees, and `print` shows it as a table.

    Raises:
        ArgumentError: An argument is not what it should be, or a single example does not run.
        PerexError: As the forward of `gm`.
    """
    runtime = _check_arguments(gm, loss_fn, targets, examples, tolerance)
    assert isinstance(gm, fx.GraphModule)
    _check_same_parameters(gm, model)
    bound = bind_inputs(gm, inputs, "inputs")
    devices = {tensor.device for tensor in (*gm.parameters(), *gm.buffers())}
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        runtime.set_aside(),
        modes_kept(gm, model),
        random_state_kept(devices),
    ):
        call, n, layouts = _prepare(runtime, bound, targets, examples)
        tolerance = tolerance or _tolerance_for(gm, call)
        forwards = Forwards(gm, runtime, model)
        as_set = forwards.mode
        noise = forwards.settle(call, tolerance)
        notes = [] if forwards.mode == as_set else [f"the forward is random in {as_set} mode, so eval mode was checked"]
        found = CheckResult(n, forwards.reference, forwards.mode, tolerance, Verdict("outputs", 0.0))
        if noise is None:
            random = Verdict("outputs", 0.0, "two equal calls give different results: nothing can be compared")
            return replace(found, outputs=random, notes=tuple(notes))
        found = _compare(forwards, call, found, layouts, loss_fn)
        if not found.parameters:
            return replace(found, notes=tuple(notes))
        names = dict(zip(noise, layouts, strict=True))
        mixing, untried = find_mixing(forwards.outputs, call, n, names, noise)
        return replace(found, mixing=tuple(mixing), notes=(*notes, *found.notes, *untried))


def _compare(
    forwards: Forwards, call: Call, found: CheckResult, layouts: tuple[Layout | None, ...], loss_fn: LossFunction | None
) -> CheckResult:
    """All that one forward and backward gives, against each example alone."""
    runtime, tolerance, n = forwards.runtime, found.tolerance, found.examples
    each: dict[str, Tensor] = {}
    with runtime.stepping(StepOptions(gradients_to=each.update)):
        output = forwards.transformed(call)
    together = output_tensors(output)
    if difference := structures_differ(together, forwards.outputs(call)):
        return replace(found, outputs=Verdict("outputs", float("inf"), difference))
    if loss_fn is None and not any(
        layout is not None and value.is_floating_point()
        for value, layout in zip(together.values(), layouts, strict=True)
    ):
        raise ArgumentError("The output has no floating-point numbers to make a loss of. Pass `loss_fn` and `targets`.")
    reduction = runtime.settings.loss_reduction
    loss = loss_fn or BuiltInLoss(layouts, reduction)
    value = loss(output, call.targets)
    sums = gradients_of(value, forwards.trained)
    if runtime.results.norms is None:
        raise ArgumentError("The loss depends on no trainable parameter, so there are no gradients to compare.")
    alone = one_at_a_time(forwards.plain, call, n, loss, forwards.trained)
    truth = Truth.of(alone)
    lost = int((~truth.finite).sum())
    return replace(
        found,
        outputs=compare_outputs(together, alone, layouts, tolerance),
        loss=None if loss_fn is None else compare_losses(value, alone, reduction, tolerance),
        norms=compare_norms(runtime, truth, tolerance),
        parameters=compare_parameters(runtime, each, sums, truth, tolerance),
        notes=(f"{lost} of {n} examples have gradients that are not finite; they must count as zero",) if lost else (),
    )


def _prepare(
    runtime: Runtime, bound: inspect.BoundArguments, targets: Any, examples: int
) -> tuple[Call, int, tuple[Layout | None, ...]]:
    """The first examples, how many these are, and where the outputs carry them; forces the whole batch's strategies."""
    kind, size = runtime.kind_of(named_tensors(bound.arguments))
    if size == 0:
        raise ArgumentError("`inputs` has no examples. Pass a batch of one at least; several show whether they mix.")
    plan = runtime.prepare(kind, size)
    analysis = runtime.known(kind)
    assert analysis is not None
    layouts = analysis.layouts_of_output()
    strategies = {site.name: plan[site.name] for site in runtime.sites.sites}
    clipping = graded if callable(runtime.settings.clipping) else runtime.settings.clipping
    runtime.settings = replace(runtime.settings, strategy=strategies, memory_budget=None, clipping=clipping)
    batch_dim, n = runtime.settings.batch_dim, min(examples, size)
    axes = {name: batch_dim for name, carries in zip(kind.names, kind.carriers, strict=True) if carries}
    whole = Call(bound, axes, targets, _target_axes(targets, size, batch_dim))
    return whole.take(range(n)), n, layouts


def _target_axes(targets: Any, size: int, batch_dim: int) -> tuple[int, ...]:
    axes = []
    for leaf in pytree.tree_leaves(targets):
        if not isinstance(leaf, Tensor):
            continue
        fitting = [axis for axis in dict.fromkeys((0, batch_dim)) if axis < leaf.dim() and leaf.shape[axis] == size]
        if len(fitting) != 1:
            found = "is their number on both" if fitting else f"is of shape {list(leaf.shape)}"
            raise ArgumentError(
                f"`targets` should have the {size} examples of the inputs on axis 0 or on `batch_dim`={batch_dim}, and "
                f"a tensor of it {found}. Pass as many targets as examples, and another number of them than of "
                "positions."
            )
        axes += fitting
    return tuple(axes)


def _tolerance_for(gm: nn.Module, call: Call) -> float:
    """By the coarsest dtype that is computed with."""
    tensors = [t for t in (*gm.parameters(), *named_tensors(call.bound.arguments).values()) if t.is_floating_point()]
    dtypes = {tensor.dtype for tensor in tensors}
    if torch.backends.cudnn.allow_tf32 and any(tensor.is_cuda for tensor in tensors):
        dtypes = {torch.float16 if dtype is torch.float32 else dtype for dtype in dtypes}  # TF32 has no more digits
    return max(TOLERANCES.get(dtype, max(TOLERANCES.values())) for dtype in dtypes)


def _check_arguments(
    gm: nn.Module, loss_fn: LossFunction | None, targets: Any, examples: int, tolerance: float | None
) -> Runtime:
    runtime = runtime_of(gm)
    if loss_fn is not None and not callable(loss_fn):
        raise ArgumentError(f"`loss_fn` should be a function of output and targets. Found {type(loss_fn).__name__}.")
    if loss_fn is None and targets is not None:
        raise ArgumentError("`targets` are for `loss_fn`, which is missing. Pass both, or neither.")
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ArgumentError(f"`examples` should be a positive number. Found {examples!r}.")
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance < 1
    ):
        raise ArgumentError(f"`tolerance` should be a relative error between 0 and 1. Found {tolerance!r}.")
    return runtime


def _check_same_parameters(gm: nn.Module, model: nn.Module | None) -> None:
    if model is None:
        return
    if not isinstance(model, nn.Module) or isinstance(getattr(model, "perexfx", None), PerExample):
        raise ArgumentError(f"`model` should be what `gm` was made from. Found {type(model).__name__}.")
    ours, theirs = ({name: p.shape for name, p in module.named_parameters()} for module in (gm, model))
    if ours != theirs:
        names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        raise ArgumentError(
            f"`model` should be what `gm` was made from. Parameter `{names[0]}` is not the same in both."
        )
