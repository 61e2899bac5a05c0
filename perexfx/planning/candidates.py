"""Every strategy at factors of one size, with its predicted cost or the reason why it was refused.

Promises: costs follow from sizes alone and are computed once per size. What goes for a whole segment of a graph, a
second backward, is priced by what is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from perexfx.ir.alternative import Alternative
from perexfx.ir.convolution import ConvolutionSignature
from perexfx.ir.cost import Cost
from perexfx.ir.cost_model import CostModel
from perexfx.ir.errors import ArgumentError
from perexfx.ir.factors import GradientSignature, Signature
from perexfx.ir.ordinary_gradient import ordinary_gradient
from perexfx.ir.rule import Fitted
from perexfx.ir.strategy import Strategy
from perexfx.sites import Segment


class Alternatives:
    """Every strategy on factors of one size; computed once per size.

    Args:
        strategies: To choose from; earlier ones win ties.
        reweight: Makes of a strategy the one that takes its norms, and clipped sums from a second backward.
        machine: Predicts seconds.
        itemsize: Bytes per element.
    """

    def __init__(
        self,
        strategies: Sequence[Strategy],
        reweight: Callable[[Strategy], Strategy],
        machine: CostModel,
        itemsize: int,
    ) -> None:
        self.strategies, self.reweight = strategies, reweight
        self.machine, self.itemsize = machine, itemsize
        self._known: dict[Signature, tuple[Alternative, ...]] = {}

    def of(self, signature: Signature) -> tuple[Alternative, ...]:
        """All of them, in the order of the strategies."""
        if signature not in self._known:
            refusals = {strategy: _refusal(strategy, signature) for strategy in self.strategies}
            costs = {s: s.cost(signature, self.itemsize) for s, reason in refusals.items() if reason is None}
            seconds = self.machine.predict(costs, signature)
            for strategy, predicted in seconds.items():
                if not predicted >= 0:
                    raise ArgumentError(f"The cost of strategy {strategy.name!r} comes to {predicted} seconds.")
            self._known[signature] = tuple(
                Alternative(s, seconds[s], costs[s]) if s in costs else Alternative(s, refusal=reason or "")
                for s, reason in refusals.items()
            )
        return self._known[signature]

    def norms_alone(self, signature: Signature) -> Alternative | None:
        """The fastest of those that hold factors for the clip node, which a second backward can do without."""
        holding = [a for a in self.of(signature) if a.cost is not None and a.cost.holds_factors]
        return None if isinstance(signature, GradientSignature) else min(holding, key=lambda a: a.seconds, default=None)

    def reweighted(self, signature: Signature, segment: Segment | None, share: int, joined: str) -> Alternative:
        """Norms alone, with a share of the second run of a segment.

        Args:
            signature: Sizes of the factors.
            segment: What is run a second time; None: the site is in no segment.
            share: Among how many operands the time of that run is divided.
            joined: Why per-example gradients must be formed; "" where they need not.
        """
        norms = self.norms_alone(signature)
        if refusal := no_second_run(segment, norms, joined):
            return Alternative(self.reweight(self.strategies[0]), refusal=refusal)
        assert norms is not None
        assert segment is not None
        strategy = self.reweight(norms.strategy)
        seconds = norms.seconds + self.machine.seconds(segment.cost) / share
        return Alternative(strategy, seconds, strategy.cost(signature, self.itemsize))

    def least_seconds(self, signature: Signature) -> float:
        """Of the best strategy."""
        return min(alternative.seconds for alternative in self.of(signature))

    def ordinary_seconds(self, signature: Signature) -> float:
        """Of the gradient over all examples together, in an ordinary backward."""
        return self.machine.seconds(Cost(ordinary_gradient(signature, self.itemsize), 0))

    def own_seconds(self, fitted: Fitted) -> float:
        """What a rule does beyond an ordinary backward, whatever the strategy."""
        return self.machine.seconds(Cost(fitted.rule.own_work(fitted.geometry, self.itemsize), 0))


def _refusal(strategy: Strategy, signature: Signature) -> str | None:
    """Why a strategy does not apply; of one that does not say that it weighs taps, where they are weighed."""
    is_weighed = isinstance(signature, ConvolutionSignature) and signature.weighs_taps
    if is_weighed and not getattr(strategy, "weighs_taps", False):
        return "it does not say that it weighs the taps of a kernel, whose squares do not count alike here"
    return strategy.refuses(signature)


def no_second_run(segment: Segment | None, norms: Alternative | None, joined: str) -> str:
    """Why an operand's clipped sum cannot come from a second backward, or ""."""
    if joined:
        return joined
    if norms is None:
        return "its gradients are held as they are formed"
    return "no single value carries the gradients of what lies above it" if segment is None else segment.refusal


__all__ = ["Alternatives", "no_second_run"]
