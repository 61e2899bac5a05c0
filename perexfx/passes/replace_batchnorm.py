"""Replacing BatchNorm, which mixes examples, by GroupNorm, which does not.

Promises: every layer is replaced, or left and said so, or nothing is touched and the error names what cannot be
replaced. Parameters stay the same objects under the same names; nothing but the layers' own attributes changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from perexfx.ir.errors import ArgumentError, RefusedError
from perexfx.ir.refusal import Place, Refusal

_logger = logging.getLogger("perexfx")

CHANNELS_PER_GROUP = 16
"""The least for layers that may see `[B, C]`: the other setting of Wu & He 2018 (arXiv:1803.08494, table 3)."""

Norm = _BatchNorm | _InstanceNorm

_MAY_SEE_NO_POSITIONS = (nn.BatchNorm1d, nn.SyncBatchNorm)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward)


@dataclass(frozen=True)
class Replacement:
    """One layer.

    Attributes:
        paths: Where it is in the model; several where it is shared.
        before: What it was.
        after: What it is now; "" where it was left as it is.
    """

    paths: tuple[str, ...]
    before: str
    after: str

    def __str__(self) -> str:
        where = ", ".join(path or "the model itself" for path in self.paths)
        return f"{where}: {self.before} -> {self.after or 'left as it is: its statistics are frozen'}"


@dataclass(frozen=True)
class Replaced:
    """What was replaced, and what was left. `str(replaced)` has a line per layer.

    Attributes:
        layers: Those replaced, in the model's order.
        frozen: Those left as they are.
    """

    layers: tuple[Replacement, ...]
    frozen: tuple[Replacement, ...]

    def __str__(self) -> str:
        title = f"{len(self.layers)} layers replaced, {len(self.frozen)} left as they are"
        return "\n".join([title, *(f"  {layer}" for layer in (*self.layers, *self.frozen))])


def replace_batchnorm(
    model: nn.Module,
    groups: int = 32,
    *,
    keep_frozen: bool = True,
    report: Callable[[Replaced], object] | None = None,
) -> nn.Module:
    """The model, with every BatchNorm turned into GroupNorm: no example's output depends on other examples any more.

    Works in place, as `torch.nn.SyncBatchNorm.convert_sync_batchnorm` does. A copy would have to share its Parameters
    with the model, so that optimizers stay valid, and training it would leave behind a model with the trained weights
    and BatchNorm's stale statistics. The layer objects themselves are converted: wherever a layer is referred to (in
    several places of the model, in a list, by a hook, as the model itself) it is the one GroupNorm.

    What is kept: the affine Parameters, `eps`, device, dtype, `requires_grad`, the training flag and hooks. What goes:
    running statistics. So a trained model computes something else afterwards and has to be trained further; checkpoints
    from before load with `strict=False`.

    InstanceNorm with running statistics becomes InstanceNorm without, which computes the same in training.

    Calls of `torch.nn.functional.batch_norm` in a forward are no layers and cannot be replaced; `transform` refuses
    them where they use batch statistics.

    Args:
        model: Any module.
        groups: The number of groups, or the largest divisor of a layer's channels below it. A BatchNorm1d or a
            SyncBatchNorm gets at least 16 channels in a group, or all it has: its input may have no other axis, and a
            group's statistics then come from its channels alone. (Of a single value they would make every output zero.
            The same holds for a BatchNorm2d or 3d that sees maps of one pixel: pass fewer groups than channels.)
        keep_frozen: Leave layers that are in eval mode in a model that is in training mode: their statistics were
            frozen on purpose, are constants, and `transform` accepts them. False: replace those too.
        report: Is called with what was replaced, `report=print` for instance. It is logged at level INFO as well.

    Raises:
        ArgumentError: `model` or `groups` is not what it should be, or a layer is lazy and has no channels yet.
        RefusedError: A layer is a subclass with a forward of its own, or cannot be a GroupNorm. Nothing was changed.
    """
    _check_arguments(model, groups)
    paths: dict[Norm, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _has_batch_statistics(module):
            paths.setdefault(module, []).append(path)
    frozen = [layer for layer in paths if keep_frozen and _is_frozen(layer, model)]
    wanted = [layer for layer in paths if layer not in frozen]
    _refuse_others({layer: paths[layer][0] for layer in wanted})
    left = tuple(Replacement(tuple(paths[layer]), repr(layer), "") for layer in frozen)
    layers = []
    for layer in wanted:
        before = repr(layer)
        _convert(layer, groups)
        layers.append(Replacement(tuple(paths[layer]), before, repr(layer)))
    replaced = Replaced(tuple(layers), left)
    _logger.info("%s", replaced)
    if report is not None:
        report(replaced)
    return model


def _check_arguments(model: nn.Module, groups: int) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"`model` should be a torch.nn.Module. Found {type(model).__name__}.")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ArgumentError(f"`groups` should be a positive number. Found {groups!r}.")
    if "perexfx" in model._modules:
        raise ArgumentError("`model` was transformed already. Replace the layers of the original model instead.")
    for path, module in model.named_modules():
        if isinstance(module, _LazyNormBase) and _has_batch_statistics(module):
            raise ArgumentError(
                f"Layer `{path}` ({type(module).__name__}) has no channels yet. Call the model once, which gives lazy "
                "modules their shapes, before its layers are replaced."
            )


def _has_batch_statistics(module: nn.Module) -> TypeGuard[Norm]:
    return isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats)


def _is_frozen(layer: Norm, model: nn.Module) -> bool:
    """Whether a layer normalises by constants while the model around it is trained."""
    return model.training and not layer.training and layer.running_mean is not None


def _refuse_others(layers: Mapping[Norm, str]) -> None:
    """Raises: RefusedError, naming every layer that cannot be replaced."""
    refusals = []
    for layer, path in layers.items():
        if reason := _why_not(layer):
            refusals.append(
                Refusal(
                    what=f"Layer `{path}` ({type(layer).__name__}) cannot be replaced: {reason}.",
                    why="GroupNorm in its place would do something else.",
                    remedy="Replace it yourself first.",
                    place=Place(path, path),
                )
            )
    if refusals:
        raise RefusedError(refusals)


def _why_not(layer: Norm) -> str | None:
    if parametrize.is_parametrized(layer):
        return "its parameters are computed from others"
    if "forward" in vars(layer) or type(layer).forward not in _FORWARDS:
        return "its forward is not torch's own"
    if layer.num_features < 1:
        return "it does not know its number of channels"
    if isinstance(layer, _MAY_SEE_NO_POSITIONS) and layer.num_features == 1:
        return "normalising a single number by itself leaves nothing of it"
    return None


def _convert(layer: Norm, groups: int) -> None:
    """Turns one layer into what replaces it: the object itself, as torch's lazy modules become others."""
    if isinstance(layer, _InstanceNorm):
        layer.track_running_stats = False
        layer._buffers.update(dict.fromkeys(_STATISTICS))
        return
    channels = layer.num_features
    if isinstance(layer, _MAY_SEE_NO_POSITIONS):
        groups = min(groups, max(1, channels // CHANNELS_PER_GROUP))
    for name in _STATISTICS:
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
    for name in ("num_features", "momentum", "track_running_stats", "process_group"):
        layer.__dict__.pop(name, None)
    layer.__class__ = nn.GroupNorm  # pyright: ignore[reportAttributeAccessIssue]
    divisor = max(divisor for divisor in range(1, min(groups, channels) + 1) if channels % divisor == 0)
    layer.__dict__.update(num_channels=channels, num_groups=divisor)


__all__ = ["CHANNELS_PER_GROUP", "Replaced", "Replacement", "replace_batchnorm"]
