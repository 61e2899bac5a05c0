"""The face of a transformed module, `gm.perexfx`: what users see, and nothing else.

Promises: it shows what the last step found and what was decided, and changes nothing; the runtime's state stands behind
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from perexfx.ir.errors import ArgumentError
from perexfx.ir.inputs import Inputs
from perexfx.ir.site import Site
from perexfx.planning import Plan
from perexfx.runtime.settings import Settings
from perexfx.runtime.state import Runtime
from perexfx.runtime.step_options import StepOptions
from perexfx.runtime.tape import Tape


class PerExample(nn.Module):
    """What `transform` adds to a model: `gm.perexfx`.

    Attributes:
        norms: Gradient norm of each example of the last backward, before clipping. Shape `[B]`.
        clip_factors: What each example's gradient was multiplied with. Shape `[B]`; with `clipping="per_layer"`
            `[groups, B]`, a row per group of sites that share parameters, in graph order.
        plan: The plan of the last forward, or the one made ahead of time; None before there is one.
        sites: Every use of a trainable parameter, in graph order.
        settings: What `transform` was asked for.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self._runtime = runtime

    def __dir__(self) -> list[str]:
        """What every module has, and what is documented."""
        return [name for name in super().__dir__() if name != "_runtime"]

    @property
    def norms(self) -> Tensor | None:
        """Gradient norm of each example of the last backward, before clipping. Shape `[B]`."""
        return self._runtime.results.norms

    @property
    def clip_factors(self) -> Tensor | None:
        """What each example's gradient was multiplied with. Shape `[B]` or `[groups, B]`."""
        return self._runtime.results.clip_factors

    @property
    def plan(self) -> Plan | None:
        """The plan of the last forward, or the one made ahead of time; None before there is one."""
        return self._runtime.plan

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every use of a trainable parameter, in graph order."""
        return self._runtime.sites.sites

    @property
    def settings(self) -> Settings:
        """What `transform` was asked for."""
        return self._runtime.settings

    def _replicate_for_data_parallel(self) -> Any:
        """As torch.nn.parallel makes replicas: each takes steps of its own."""
        found: Any = super()._replicate_for_data_parallel()
        found._runtime = self._runtime.replica()
        return found

    def extra_repr(self) -> str:
        """A line for `print(gm)`."""
        return f"{len(self.sites)} sites, clip_norm={self.settings.clip_norm}, clipping={self.settings.clipping!r}"

    def forward(self, names: tuple[str, ...], *values: Any) -> Tape:
        """The tape of one forward: the first node of the rewritten graph."""
        return self._runtime.begin(names, values)


def runtime_of(gm: nn.Module) -> Runtime:
    """The runtime's state of a transformed module.

    Raises:
        ArgumentError: It is not a transformed module.
    """
    face = getattr(gm, "perexfx", None)
    if not isinstance(face, PerExample):
        raise ArgumentError(f"`gm` should come from `perexfx.transform`. Found {type(gm).__name__}.")
    return face._runtime


def planned(gm: nn.Module) -> tuple[Runtime, Plan, Inputs]:
    """The runtime's state of a transformed module, its last plan, and the kind of input that this is for.

    Raises:
        ArgumentError: It is not a transformed module, or there is no plan yet.
    """
    runtime = runtime_of(gm)
    if runtime.plan is None or runtime.kind is None:
        raise ArgumentError(
            "There is no plan yet: without example inputs it is made at the first batch. "
            "Call the module once, or pass `example_inputs` to `transform`."
        )
    return runtime, runtime.plan, runtime.kind


def stepping(gm: nn.Module, options: StepOptions) -> Callable[..., Any]:
    """The transformed module as a function whose steps run as the options say."""
    runtime = runtime_of(gm)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with runtime.stepping(options):
            return gm(*args, **kwargs)

    return forward


__all__ = ["PerExample", "planned", "runtime_of", "stepping"]
