"""`perexfx.downsample`: a model that runs on its images at half the resolution, with its own parameters.

Promises: parameters and buffers are the model's own, and statistics of its normalisations are left as they are; every
size is ceil(N / 2) of the fine one, so that additions and concatenations fit; what each node became is in the report.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import replace

import torch.nn.functional as F
from torch import fx, nn

from perexfx.capture import Conditions, WholeGraphModule
from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import GivenInputs
from perexfx.ir.node import info_of
from perexfx.rewrites.coarse import SIDES, Coarsening
from perexfx.rewrites.coarse_operations import HANDLERS
from perexfx.rewrites.coarse_tokens import NoTokensError, add_of_tokens, fits, flatten
from perexfx.rewrites.rewritten import Rewriting, Rewritten, rewritten
from perexfx.rewrites.sides import Sides
from perexfx.rewrites.subject import Subject, subject_of

KERNELS = ("side", "galerkin", "average")
POOLS = ("average", "max")


def downsample(
    model: nn.Module,
    example_inputs: GivenInputs | None = None,
    *,
    factor: int = 2,
    kernel: str = "side",
    pool: str = "average",
    until: str | None = None,
) -> Rewritten:
    """The model on images of half the size: a GraphModule around the same parameters, which takes full-size inputs.

    Inputs `[n, C, H, W]` are shrunk, and every convolution on them runs with a pooled kernel, whose taps are summed
    coarse pixel by coarse pixel. A network's first layers then cost about a fourth of their pixels, and less than half
    of their taps. What is known of other operations (pools, normalisations, residual sums, resizes, tables of
    positions) works on coarse images as well; what is not reads them grown to their fine size, as flattening heads do.
    A map of patches that is flattened into tokens gives a fourth of them, where the model takes none by its place.

    It is for some of the batches of a training: see `perexfx.interleave`. BatchNorm and InstanceNorm keep no statistics
    in it; other buffers change as they do in the model. After `perexfx.transform`, per-example gradients reach the
    model's own parameters through the pooled kernels, under the same draw.

    Args:
        model: Any module that `perexfx.transform` can capture.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs, examples first. The reduced
            model is for images of their size; batches may have any.
        factor: By which height and width are divided: 2.
        kernel: "side": every convolution takes its sample on a side of its coarse pixel that is drawn anew at every
            forward in training (and alternates in evaluation): a 3 x 3 kernel has 2 x 2 taps. "galerkin": the mean over
            sides: 3 x 3 taps, nothing is drawn. "average": as "side", with means of taps in the place of their sums,
            which is another function, for comparison.
        pool: How input images are shrunk: "average" or "max".
        until: Path of a module: only what runs before its end, itself included, is coarse. The coarse maps of late
            stages are small, and compute something else.

    Returns:
        The reduced model. `perexfx.report` tells what each layer became, and predicts the time of a step.

    Raises:
        ArgumentError: An argument is not what it should be, or there is no image among the inputs.
        CaptureError: The model cannot be captured.
        RefusedError: Its graph fails on these shapes.

    References:
        Poulos, Nouri, Moshovos 2019, "Training CNNs faster with Dynamic Input and Kernel Downsampling"
        (arXiv:1910.06548), whose abstract alone is public here: what is done is our reading of it.
    """
    _check(model, example_inputs, factor, kernel, pool)
    subject = subject_of(model, example_inputs)
    before = copy.deepcopy(subject.graph)
    _keep_statistics(subject.graph)
    if SIDES in dict(subject.twin.named_children()) or hasattr(model, SIDES):
        raise ArgumentError(f"The model has an attribute `{SIDES}`: it was reduced already. Reduce the original model.")
    coarsening, graph = _coarsened(subject, kernel, pool, _last(subject, until), model.training)
    if not coarsening.coarse:
        raise ArgumentError(
            "None of the example inputs is an image `[n, C, H, W]` of floating-point numbers, of more than one pixel "
            "and an argument of its own, so there is nothing to reduce."
        )
    conditions = _for_these_sizes(subject, coarsening)
    captured = replace(subject.captured, graph=graph, conditions=conditions)
    of = "" if until is None else f" until `{until}`"
    summary = f"Images at half the resolution{of}, kernels by {kernel!r}; {coarsening.drawn} sides are drawn."
    rewriting = Rewriting("downsample", summary, before, tuple(coarsening.changes), subject.sizes)
    return rewritten(subject.twin, captured, rewriting)


def _coarsened(
    subject: Subject, kernel: str, pool: str, last: fx.Node | None, training: bool
) -> tuple[Coarsening, fx.Graph]:
    """The graph over coarse images; with fewer tokens where the model allows it, and their sides in its twin."""
    handlers = {**HANDLERS, "flatten": flatten}
    for keeps_tokens in (True, False):
        coarsening = Coarsening(subject, handlers, kernel, pool, last)
        coarsening.keeps_tokens, coarsening.with_tokens = keeps_tokens, add_of_tokens
        try:
            graph = coarsening.run()
        except NoTokensError:
            continue
        if coarsening.drawn:
            subject.twin.add_module(SIDES, Sides(coarsening.drawn, 2).train(training))
        if not coarsening.of_tokens or fits(coarsening, graph, subject):
            break
    return coarsening, graph  # pyright: ignore[reportPossiblyUnbound] (without tokens nothing is raised)


def _check(model: nn.Module, example_inputs: GivenInputs | None, factor: int, kernel: str, pool: str) -> None:
    if isinstance(model, WholeGraphModule) and model.is_transformed:
        raise ArgumentError(
            "`model` comes from `perexfx.transform`: its clip node would not know the pooled kernels. Reduce first: "
            "`perexfx.transform(perexfx.downsample(model, x), x)`."
        )
    if example_inputs is None:
        raise ArgumentError(
            "`example_inputs` should be inputs of the model: the sizes of its images decide how every layer is "
            "reduced. Found None."
        )
    if isinstance(factor, bool) or factor != 2:
        raise ArgumentError(f"`factor` should be 2, the one that kernels can be pooled by. Found {factor!r}.")
    if kernel not in KERNELS:
        raise ArgumentError(f"`kernel` should be one of {', '.join(map(repr, KERNELS))}. Found {kernel!r}.")
    if pool not in POOLS:
        raise ArgumentError(f"`pool` should be one of {', '.join(map(repr, POOLS))}. Found {pool!r}.")


def _for_these_sizes(subject: Subject, coarsening: Coarsening) -> Conditions:
    """What the graph demands of its inputs, the sizes of its images among it."""
    known = subject.captured.conditions
    sizes = dict(known.sizes)
    for node in coarsening.coarse:
        if node.op == "placeholder":
            *_, channels, height, width = coarsening.shapes[node.name]
            fixed = ((channels, channels), (height, height), (width, width))
            sizes[str(node.target)] = ((0, math.inf), *fixed)
    return replace(known, sizes=sizes)


def _last(subject: Subject, until: str | None) -> fx.Node | None:
    """The last node of a module; None without one."""
    if until is None:
        return None
    inside = [
        node
        for node in subject.graph.nodes
        if any(
            path == until or path.startswith(f"{until}.")
            for path in (info_of(node).module, str(node.target) if node.op == "call_module" else "")
        )
    ]
    if not inside or not isinstance(until, str):
        names = [name for name, _ in subject.twin.named_modules() if name and "." not in name]
        raise ArgumentError(
            "`until` should be the path of a module that the forward calls, such as "
            f"{', '.join(map(repr, names[:6]))}. Found {until!r}."
        )
    return inside[-1]


def _keep_statistics(graph: fx.Graph) -> None:
    """Has normalisations that keep statistics leave them as they are: means move by no part."""
    for node in graph.nodes:
        if node.target in (F.batch_norm, F.instance_norm):
            given = dict(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments)
            given["momentum"] = 0.0
            node.args, node.kwargs = (given.pop("input"),), given


__all__ = ["downsample"]
