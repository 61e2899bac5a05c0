"""Every layer's per-example gradients from its input and the gradient of its output, by the chain rule.

Promises: one forward and one backward, which forms no parameter's gradient; each layer's per-example gradients are then
formed at once, a convolution's by another convolution with as many groups as there are examples, with stride and
dilation swapped. Layers that the papers' method has no formula for are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from perexfx.engines.method import Method, item
from perexfx.engines.problem import Batch, Problem, StepResult, refuse_other_joins
from perexfx.ir import ConvolutionSignature, squared_norms_of
from perexfx.ir.errors import RefusedError
from perexfx.ir.inputs import arguments_for
from perexfx.ir.refusal import Refusal
from perexfx.ir.rule import Fitted
from perexfx.ir.site import Site
from perexfx.planning import Plan


class ChainRule(Method):
    """Per-example gradients of every layer, formed from its input and the gradient of its output.

    References: `crb` of Rochette et al. 2019, arXiv:1912.06015, section 3; Goodfellow 2015, arXiv:1510.01799.
    """

    name = "chain_rule"
    also = "crb (Rochette et al.)"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._module: fx.GraphModule | None = None

    def run(self, batch: Batch) -> StepResult:
        """One forward, one backward, and a formula for each layer."""
        problem, n = self.problem, batch.n
        gm, graph, sites = self.transformed(), self.runtime.captured.graph, self.runtime.sites
        _refuse_others(sites.sites)
        plan, analysis = self.plan_for(batch)
        if self._module is None:
            self._module = fx.GraphModule(gm, tapped(graph, {site.node: site for site in sites.sites}))
        like = next(iter(problem.trained.values()))
        taps = Taps(like.new_zeros(()).requires_grad_())
        parameters = {name: p.detach() for name, p in problem.trained.items()}
        output = self.run_graph(self._module, taps, parameters, *arguments_for(graph, batch.leaves))
        loss = problem.loss_of(output, batch.targets)
        if self.is_first:
            problem.refuse_own_gradients(output, batch.targets)
            refuse_other_joins(problem, output, analysis.layouts_of_output(), batch)
        torch.autograd.grad(loss, taps.token, allow_unused=True)
        del output
        with torch.no_grad():
            return self._clipped(self._formed(taps, plan, n), loss.detach(), n)

    def _formed(self, taps: Taps, plan: Plan, n: int) -> dict[str, Tensor]:
        """Parameter name -> every example's gradient; what was noted for a layer is let go with it."""
        scale = n if self.problem.loss_reduction == "mean" else 1
        each: dict[str, Tensor] = {}
        for site in self.runtime.sites.sites:
            if site.name not in taps.gradients:
                continue
            arguments, gradient = taps.arguments.pop(site.name), taps.gradients.pop(site.name) * scale
            found = FORMULAS[site.kind](arguments, gradient, plan.fitted[site.name])
            for operand in site.operands:
                (name,) = operand.expression.parameters
                value = found[operand.name]
                each[name] = each[name] + value if name in each else value
        return each

    def _clipped(self, each: dict[str, Tensor], loss: Tensor, n: int) -> StepResult:
        problem = self.problem
        like = next(iter(problem.trained.values()))
        squares = [squared_norms_of(value) for value in each.values()]
        norms = torch.stack(squares).sum(0).sqrt() if squares else like.new_zeros(n).detach()
        factors, lost = problem.factors(norms) * problem.share(n), ~torch.isfinite(norms)
        has_lost = bool(lost.any())
        grads = {}
        for name, parameter in problem.trained.items():
            if name not in each:
                grads[name] = torch.zeros_like(parameter, requires_grad=False)
                continue
            flat = each.pop(name).reshape(n, -1)
            flat = flat.masked_fill(lost[:, None], 0) if has_lost else flat
            grads[name] = (factors.to(flat.dtype) @ flat).reshape(parameter.shape)
        return StepResult(loss, norms, grads)


class Taps:
    """What is noted at the layers of one forward and backward.

    Attributes:
        token: What every layer's output is made to depend on.
        arguments: Site -> its arguments by name.
        gradients: Site -> the gradient of its output.
    """

    def __init__(self, token: Tensor) -> None:
        self.token = token
        self.arguments: dict[str, dict[str, Any]] = {}
        self.gradients: dict[str, Tensor] = {}


class _Tap(Function):
    """Identity; its backward notes the gradient."""

    @staticmethod
    def forward(ctx: Any, taps: Taps, _token: Tensor, site: str, output: Tensor) -> Tensor:
        ctx.taps, ctx.site = taps, site
        return torch.ops.aten._unsafe_view.default(output, output.shape)  # later layers may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides names)
        (gradient,) = grad_outputs
        ctx.taps.gradients[ctx.site] = gradient
        return None, gradient.new_zeros(()), None, gradient


def tap(taps: Taps, site: Site, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's output, with its arguments noted, and the gradient when it comes."""
    taps.arguments[site.name] = site.rule.bind(site.target, args, kwargs)
    assert callable(site.target)
    return _Tap.apply(taps, taps.token, site.name, site.target(*args, **kwargs))


def tapped(graph: fx.Graph, sites: Mapping[str, Site]) -> fx.Graph:
    """A graph whose sites are tapped; its first inputs are the taps, and a dict from name to parameter.

    Args:
        graph: In functional form.
        sites: By the name of their node.
    """
    found = fx.Graph()
    taps, parameters = found.placeholder("taps"), found.placeholder("parameters")
    trained = {name for site in sites.values() for name in site.parameters}
    new: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in trained:
            new[node] = found.call_function(item, (parameters, node.target))
        elif node.name in sites:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), new.__getitem__)
            new[node] = found.create_node("call_function", _tap_of(sites[node.name]), (taps, *args), kwargs)
        else:
            new[node] = found.node_copy(node, new.__getitem__)
    return found


def _tap_of(site: Site) -> Callable[..., Tensor]:
    def tap_here(taps: Taps, *args: Any, **kwargs: Any) -> Tensor:
        return tap(taps, site, *args, **kwargs)

    tap_here.__name__ = f"tap_{site.node}"
    return tap_here


Found = dict[str, Tensor]


def _linear(arguments: Mapping[str, Any], gradient: Tensor, fitted: Fitted) -> Found:
    """`n t i, n t o -> n o i`; the bias' is summed over positions."""
    left = fitted.geometry.layouts["input"].examples_first(arguments["input"]).flatten(1, -2)
    right = fitted.geometry.output_layout.examples_first(gradient).flatten(1, -2)
    return {"weight": torch.bmm(right.transpose(1, 2), left), "bias": right.sum(1)}


def _convolution(arguments: Mapping[str, Any], gradient: Tensor, fitted: Fitted) -> Found:
    """By a convolution with as many groups as there are images; several images of one example are added."""
    signature = fitted.signatures["weight"]
    assert isinstance(signature, ConvolutionSignature)
    x, n = arguments["input"], signature.n
    missing = [size - own for size, own in zip(signature.in_size, x.shape[2:], strict=True)]  # "same" pads the end
    if any(missing):
        x = F.pad(x, [amount for extra in reversed(missing) for amount in (0, extra)])
    weight = convolution_gradients(x, gradient, signature)
    bias = gradient.flatten(2).sum(2)
    layout = fitted.geometry.output_layout
    return {"weight": _per_example(weight, layout, n), "bias": _per_example(bias, layout, n)}


def _per_example(images: Tensor, layout: Any, n: int) -> Tensor:
    """Of images, that of the examples they belong to."""
    return images if images.shape[0] == n else layout.examples_first(images).sum(1)


def convolution_gradients(x: Tensor, gradient: Tensor, signature: ConvolutionSignature) -> Tensor:
    """The kernel's gradient of every image. Shape `[images, *kernel's]`.

    One- and two-dimensional ones get another axis, over the input channels of a group; three-dimensional ones have
    these in the place of the batch.

    Args:
        x: Shape `[images, C, *size]`.
        gradient: Of the output. Shape `[images, O, *size]`.
        signature: Kernel, stride, padding, dilation and groups.

    References: Rochette et al. 2019, arXiv:1912.06015, equation 4 and algorithm 2.
    """
    how, images = signature.geometry, x.shape[0]
    groups, out_channels = images * how.groups, gradient.shape[1]
    kernel, rank = signature.shape[2:], len(signature.shape) - 2
    channels, positions = x.shape[1] // how.groups, gradient.shape[2:]
    if rank < 3:
        convolve = F.conv2d if rank == 1 else F.conv3d
        rows = x.reshape(1, groups, channels, *x.shape[2:])
        taps = gradient.reshape(images * out_channels, 1, 1, *positions)
        stride, padding, dilation = (1, *how.dilation), (0, *how.padding), (1, *how.stride)
        found = convolve(rows, taps, None, stride, padding, dilation, groups)[0]
    else:
        rows = x.reshape(groups, channels, *x.shape[2:]).transpose(0, 1)
        taps = gradient.reshape(images * out_channels, 1, *positions)
        found = F.conv3d(rows, taps, None, how.dilation, how.padding, how.stride, groups).transpose(0, 1)
    for axis, size in enumerate(kernel, start=2):
        found = found.narrow(axis, 0, size)
    return found.reshape(images, out_channels, channels, *kernel)


def _group_norm(arguments: Mapping[str, Any], gradient: Tensor, fitted: Fitted) -> Found:
    """Of the scale `sum_t g * xhat`, of the shift `sum_t g`."""
    normalized = F.group_norm(arguments["input"], arguments["num_groups"], eps=arguments["eps"])
    layout, n = fitted.geometry.output_layout, fitted.geometry.n
    scale, shift = (
        value.flatten(2).sum(2) if value.dim() > 2 else value for value in (gradient * normalized, gradient)
    )
    return {"weight": _per_example(scale, layout, n), "bias": _per_example(shift, layout, n)}


def _layer_norm(arguments: Mapping[str, Any], gradient: Tensor, fitted: Fitted) -> Found:
    """The same over the axes that are normalised."""
    shape = list(arguments["normalized_shape"])
    normalized = F.layer_norm(arguments["input"], shape, eps=arguments["eps"])
    layout = fitted.geometry.output_layout

    def summed(value: Tensor) -> Tensor:
        rows = layout.examples_first(value)
        return rows.flatten(1, rows.dim() - len(shape) - 1).sum(1)

    return {"weight": summed(gradient * normalized), "bias": summed(gradient)}


FORMULAS: dict[str, Callable[[Mapping[str, Any], Tensor, Fitted], Found]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
}
"""Kind of site -> its per-example gradients, by operand."""


def _refuse_others(sites: tuple[Site, ...]) -> None:
    """Raises: RefusedError, naming every layer that there is no formula for."""
    refusals = []
    for site in sites:
        reason = ""
        if site.kind not in FORMULAS:
            reason = f"it is {site.kind}, for which the method has no formula"
        elif any(operand.expression.function is not None for operand in site.operands):
            reason = "its weight is computed from parameters"
        if reason:
            refusals.append(
                Refusal(
                    what=f"`chain_rule` cannot treat `{site.name}` at {site.place}: {reason}.",
                    why=f"Formulas are there for {', '.join(FORMULAS)}.",
                    remedy="Use `perexfx.transform`, or `perexfx.engines.one_by_one`.",
                    place=site.place,
                )
            )
    if refusals:
        raise RefusedError(refusals)


__all__ = ["ChainRule", "convolution_gradients"]
