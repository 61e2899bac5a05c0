"""The other ways to clipped per-example gradients that are measured: libraries, torch's own, and one at a time.

Each is used as its documentation says, without noise, and leaves in `.grad` what `perexfx` leaves there: the mean over
examples of gradients clipped by their flat norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from perexfx import engines
from perexfx.bench.steps import Setup, Step, clipped


class Maker(Protocol):
    """A function of a module: it can be pickled."""

    def __call__(self, setup: Setup, clip_norm: float) -> Step:
        """The step that clips to a norm."""
        ...


@dataclass(frozen=True)
class Peer:
    """One way to clipped gradients.

    Attributes:
        name: For tables.
        make: Makes its step.
        package: What it imports; "": nothing but torch.
        distribution: What to install where the package is missing.
    """

    name: str
    make: Maker
    package: str = ""
    distribution: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return not self.package or find_spec(self.package) is not None


def opacus_hooks(setup: Setup, clip_norm: float) -> Step:
    """Per-example gradients by hooks, clipped as Opacus's optimizer does (Yousefpour et al. 2021, arXiv:2109.12298)."""
    optimizers = import_module("opacus.optimizers")
    _validate_for_opacus(setup.model)
    module = import_module("opacus.grad_sample").GradSampleModule(setup.model, loss_reduction="mean")
    optimizer = optimizers.DPOptimizer(*_sgd(setup), **_without_noise(setup, clip_norm))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        setup.loss(module(setup.inputs), setup.targets).backward()
        optimizer.clip_and_accumulate()
        for parameter in setup.parameters:
            parameter.grad = vars(parameter)["summed_grad"] / setup.n

    return step


def opacus_ghost(setup: Setup, clip_norm: float) -> Step:
    """Norms without gradients, then a second backward of the weighted loss (Li et al. 2022, arXiv:2110.05679)."""
    optimizers, utils = import_module("opacus.optimizers"), import_module("opacus.utils.fast_gradient_clipping_utils")
    _validate_for_opacus(setup.model)
    wrapper = import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping
    module = wrapper(setup.model, max_grad_norm=clip_norm, use_ghost_clipping=True, loss_reduction="mean")
    optimizer = optimizers.DPOptimizerFastGradientClipping(*_sgd(setup), **_without_noise(setup, clip_norm))
    criterion = utils.DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss(), loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = module(setup.inputs)
        criterion(output.flatten(0, -2), setup.targets.flatten(), shape=output.shape).backward()
        for parameter in setup.parameters:
            assert parameter.grad is not None
            parameter.grad /= setup.n

    return step


def _validate_for_opacus(model: nn.Module) -> None:
    """As its PrivacyEngine does first. Raises: what Opacus refuses the model with."""
    _keep_inputs(model)
    import_module("opacus.validators").ModuleValidator.validate(model, strict=True)


def _sgd(setup: Setup) -> tuple[torch.optim.Optimizer]:
    return (torch.optim.SGD(setup.parameters, lr=0.1),)


def _without_noise(setup: Setup, clip_norm: float) -> Mapping[str, float]:
    return {"noise_multiplier": 0.0, "max_grad_norm": clip_norm, "expected_batch_size": setup.n}


def backpack(setup: Setup, clip_norm: float) -> Step:
    """Per-example gradients by BackPACK's `BatchGrad` (Dangel et al. 2020, arXiv:1912.10985)."""
    library, extensions = import_module("backpack"), import_module("backpack.extensions")
    _keep_inputs(setup.model)
    model, loss = library.extend(setup.model), library.extend(nn.CrossEntropyLoss())

    def step() -> None:
        setup.forget_gradients()
        output = model(setup.inputs)
        with library.backpack(extensions.BatchGrad()):
            loss(output.flatten(0, -2), setup.targets.flatten()).backward()
        left_out = [name for name, parameter in setup.model.named_parameters() if not hasattr(parameter, "grad_batch")]
        if left_out:
            raise NotImplementedError(f"Leaves out {len(left_out)} parameters, `{left_out[0]}` for one.")
        gradients = [setup.n * vars(parameter).pop("grad_batch") for parameter in setup.parameters]
        _clip_into(setup.parameters, gradients, clip_norm)

    return step


def _keep_inputs(model: nn.Module) -> None:
    """Hooks need the inputs of modules: activations write into them no more."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            vars(module)["inplace"] = False


def vmapped(setup: Setup, clip_norm: float) -> Step:
    """`torch.func`: the gradient of one example's loss, mapped over the batch."""
    parameters = dict(setup.model.named_parameters())

    def loss_of_one(tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return setup.loss(functional_call(setup.model, dict(tensors), (x[None],)), y[None])

    gradients_of = vmap(grad(loss_of_one), (None, 0, 0))

    def step() -> None:
        tensors = {name: parameter.detach() for name, parameter in parameters.items()}
        found = gradients_of(tensors, setup.inputs, setup.targets)
        _clip_into(list(parameters.values()), [found[name] for name in parameters], clip_norm)

    return step


def _clip_into(parameters: Sequence[Tensor], gradients: Sequence[Tensor], clip_norm: float) -> None:
    """Fills `.grad` with the mean of clipped gradients, given each as `[n, *shape]`."""
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = clip_factors(norms, clip_norm) / len(norms)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.einsum("n,n...->...", factors, gradient)


def one_by_one(setup: Setup, clip_norm: float) -> Step:
    """A forward and a backward per example: what all others are compared with."""
    take = engines.one_by_one.step(setup.model, setup.loss, clip_norm=clip_norm)

    def step() -> None:
        setup.forget_gradients()
        take(setup.inputs, setup.targets)

    return step


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of several tensors together."""
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """What gradients of these norms are multiplied with: flat clipping."""
    return (clip_norm / norms).clamp(max=1)


PEERS: tuple[Peer, ...] = (
    Peer("perexfx", clipped),
    Peer("Opacus hooks", opacus_hooks, "opacus", "opacus"),
    Peer("Opacus ghost", opacus_ghost, "opacus", "opacus"),
    Peer("BackPACK", backpack, "backpack", "backpack-for-pytorch"),
    Peer("vmap(grad)", vmapped),
    Peer("one at a time", one_by_one),
)
