"""The guide of a merge: which pathway learns how much of which class.

Promises: with equal scores a guided merge is the plain one, value and gradients, to the last bit; in eval its value
always is. From one forward to the next the table is constant, also where a checkpoint runs the forward again. What is
not finite neither enters the table nor is hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from perexfx.ir.errors import ArgumentError
from perexfx.kernels.watched import is_watched
from perexfx.rewrites.guidance import Guidance

_logger = logging.getLogger("perexfx")

_FLOOR = 1e-3
"""Below all scores, so that a pathway without errors keeps a share."""


class Guide(nn.Module):
    """A guided merge of P pathways' logits for C classes, and its table of weaknesses.

    With terms `t_p` (the model's own weights included, so that `merge = sum_p t_p`) and coefficients `a[p, c]` that sum
    to 1 over the pathways, `d = P sum_p (a[p, c] - 1/P) t_p`. Per class the value is the plain merge, and the gradient
    that of `merge + d`: term p gets the plain merge's gradient for class c times `P a[p, c]`. Per target the value is
    `merge + d` too, with `a[p, y_i]` for every class of example i.

    Attributes:
        weakness: `[P, C]`: what pathway p alone scores on class c, 0 for a class that was never seen. Compare down a
            column: the same class across pathways. Is in `state_dict`, as are the three below.
        seen: `[C]`: which classes have been scored.
        pending: `[P, C]`: scores of the last training forward, which the next one puts into the table.
        pending_classes: `[C]`: which classes these are of.

    Args:
        pathways: P.
        guidance: How the merge is guided.
        dtype: Of the table; nothing below float32 is kept in it.
        device: Of the table.
    """

    weakness: Tensor
    seen: Tensor
    pending: Tensor
    pending_classes: Tensor

    def __init__(
        self,
        pathways: int,
        guidance: Guidance,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.pathways, self.guidance = pathways, guidance
        for name in ("weakness", "pending"):
            self.register_buffer(name, torch.zeros(pathways, guidance.num_classes, dtype=dtype, device=device))
        for name in ("seen", "pending_classes"):
            self.register_buffer(name, torch.zeros(guidance.num_classes, dtype=torch.bool, device=device))
        if guidance.choose == "weakest":
            _logger.warning(
                'guide_logits(choose="weakest") gives each class to one pathway alone: the others get no gradient for '
                'it, and some are starved. In our trials it lost accuracy; choose="soft" did not.'
            )

    def coefficients(self) -> Tensor:
        """Each pathway's share of each class, `[P, C]`: sums to 1 over pathways, and is 1/P where scores are equal."""
        if self.guidance.choose == "weakest":
            largest = (self.weakness == self.weakness.amax(0, keepdim=True)).to(self.weakness)
            return largest / largest.sum(0, keepdim=True)
        return torch.softmax(torch.log(self.weakness + _FLOOR) / self.guidance.temperature, 0)

    def forward(
        self, merged: Tensor, terms: Tensor, logits: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """The guided merge, `[n, C]`; in training, with a table from the batch, the table moves on.

        Args:
            merged: The plain merge, `[n, C]`.
            terms: What it is the sum of, `[P, n, C]`.
            logits: Of each pathway alone, `[P, n, C]`; for a table from the batch.
            targets: Classes of the examples, `[n]`.
        """
        if self.guidance.table_from == "batch":
            assert logits is not None
            self._move_on(logits, targets)
        live = float(self.pathways) if self.training else 0.0  # a number of both modes, which captures keep live
        offsets = (self.coefficients() - 1 / self.pathways).type_as(terms)
        if self.guidance.per == "target":
            picked = of_targets(offsets, terms, targets, self.training)
            routed = (picked.unsqueeze(-1) * terms).sum(0) * live
            shift = 0.0 - routed
        else:
            routed = (offsets.unsqueeze(1) * terms).sum(0) * live
            shift = routed.detach() - routed
        # what is subtracted is +0 where nothing changes, which leaves even -0 as it is
        return merged - shift.masked_fill(~merged.isfinite(), 0.0)

    @torch.no_grad()
    def update(self, logits: Tensor | Sequence[Tensor], targets: Tensor) -> None:
        """Puts the scores of some examples into the table at once. Call it between steps.

        Args:
            logits: Of each pathway alone: `[P, n, C]`, or P tensors `[n, C]`.
            targets: Their classes, `[n]`.

        Raises:
            ArgumentError: The table follows the batches by itself, or these do not fit it.
        """
        if self.guidance.table_from != "given":
            raise ArgumentError(
                'This guide\'s table follows the batches (table_from="batch"). Pass `table_from="given"` to '
                "`guide_logits` to update it yourself."
            )
        given = list(logits) if isinstance(logits, Sequence) or (isinstance(logits, Tensor) and logits.dim()) else []
        if len(given) != self.pathways:
            raise ArgumentError(
                f"`logits` should be those of {self.pathways} pathways: a tensor of shape [{self.pathways}, n, "
                f"{self.guidance.num_classes}], or a list. Found {len(given) or type(logits).__name__}."
            )
        stacked = stack_pathways(given, self.guidance.num_classes)
        check_targets(targets, stacked.shape[1], self.guidance.num_classes)
        self._take(*self._scores(stacked, targets))

    def _move_on(self, logits: Tensor, targets: Tensor | None) -> None:
        """The scores of the last training forward go into the table, and those of this one wait for the next."""
        if not self.training or (not torch.compiler.is_compiling() and _inside_a_backward()):
            return
        if targets is not None:
            check_targets(targets, logits.shape[1], self.guidance.num_classes)
        with torch.no_grad():
            self._take(self.pending, self.pending_classes)
            self.pending_classes.zero_()
            if targets is not None:
                scores, classes = self._scores(logits, targets)
                self.pending.copy_(scores)
                self.pending_classes.copy_(classes)

    def _scores(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean scores by pathway and class, `[P, C]`, and the classes that have some, all finite, `[C]`."""
        logits, targets = logits.detach().to(self.weakness), targets.to(self.weakness.device, torch.long)
        scores = _EXAMPLE_SCORES[self.guidance.score](logits, targets.expand(logits.shape[:2]))
        counts = torch.zeros_like(self.weakness[0]).index_add_(0, targets, torch.ones_like(scores[0]))
        means = torch.zeros_like(self.weakness).index_add_(1, targets, scores) / counts.clamp(min=1)
        finite = means.isfinite().all(0)
        return means.masked_fill(~finite, 0.0), (counts > 0) & finite

    def _take(self, scores: Tensor, classes: Tensor) -> None:
        """`W = m W + (1 - m) s` for some classes; at first sight `W = s`."""
        m = self.guidance.momentum
        moved = torch.where(self.seen, m * self.weakness + (1 - m) * scores, scores)
        self.weakness.copy_(torch.where(classes, moved, self.weakness))
        self.seen.logical_or_(classes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Guide:
        """The table does not follow the model to a dtype below float32, in which means stop to move."""
        before = {name: self._buffers[name] for name in ("weakness", "pending")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(device=new.device)
        return self

    def extra_repr(self) -> str:
        """What it guides, and how."""
        g = self.guidance
        choice = f"{g.choose}, temperature={g.temperature:g}" if g.choose == "soft" else g.choose
        return (
            f"{self.pathways} pathways, {g.num_classes} classes, score={g.score}, choose={choice}, per={g.per}, "
            f"momentum={g.momentum:g}, table_from={g.table_from}, {int(self.seen.sum())} classes seen"
        )


def _inside_a_backward() -> bool:
    """Whether autograd is at work around: a checkpoint runs the forward of a step that has been counted."""
    return torch._C._current_graph_task_id() != -1


def _is_inside_a_vmap() -> bool:
    """Whether a transform of torch.func is at work around: values cannot be looked at."""
    return peek_interpreter_stack() is not None


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _error(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) != targets).to(logits).masked_fill(logits.isnan().any(-1), torch.nan)


def _probability(logits: Tensor, targets: Tensor) -> Tensor:
    return 1 - torch.exp(-_loss(logits, targets))


_EXAMPLE_SCORES = {"loss": _loss, "error": _error, "probability": _probability}
"""From logits `[P, n, C]` and targets `[P, n]` to `[P, n]`; no numbers where logits are none."""


def _one_node(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that graphs have as one node, whoever traces it: it looks at what tracing does not know."""

    @wraps(function)
    def call(*args: Any) -> Any:
        traced = next((leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, fx.Proxy)), None)
        return function(*args) if traced is None else traced.tracer.create_proxy("call_function", call, args, {})

    return call


@_one_node
def stack_pathways(logits: Sequence[Tensor], num_classes: int) -> Tensor:
    """Pathways' logits as one tensor, `[P, n, C]`.

    Raises:
        ArgumentError: Some are not `[n, C]`.
    """
    for at, value in enumerate(logits):
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape != (logits[0].shape[0], num_classes):
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            n = logits[0].shape[0] if isinstance(logits[0], Tensor) and logits[0].dim() else "n"
            raise ArgumentError(
                f"The logits of pathway {at} should have shape [{n}, {num_classes}]: examples first, and "
                f"`num_classes` classes. Found {found}."
            )
    return torch.stack(list(logits))


@_one_node
def of_targets(offsets: Tensor, terms: Tensor, targets: Tensor | None, training: bool) -> Tensor:
    """The columns of a table `[P, C]` that examples' targets name, `[P, n]`; a column of zeros in eval.

    Raises:
        ArgumentError: In training there are no targets, or they are not classes.
    """
    if not training:
        return torch.zeros_like(offsets[:, :1])
    if targets is None:
        raise ArgumentError(
            '`targets` should be the classes of the examples, [n], in training: with per="target" each example\'s own '
            "class chooses its pathways. Found None. Call the model as `model(x, targets=y)`, or in eval mode."
        )
    check_targets(targets, terms.shape[1], offsets.shape[1])
    return offsets[:, targets.long()]


def check_targets(targets: Any, n: int, num_classes: int) -> None:
    """Checks that targets are classes of n examples; their values only where there are some to look at.

    Raises:
        ArgumentError: They are not.
    """
    expected = (
        f"`targets` should be the classes of the {n} examples: integers from 0 to {num_classes - 1}, of shape [{n}]."
    )
    if not isinstance(targets, Tensor):
        raise ArgumentError(f"{expected} Found {type(targets).__name__}.")
    if targets.dim() != 1 or targets.shape[0] != n:
        raise ArgumentError(f"{expected} Found shape {list(targets.shape)}.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ArgumentError(f"{expected} Found {targets.dtype}.")
    if targets.numel() == 0 or torch.compiler.is_compiling() or is_watched() or _is_inside_a_vmap():
        return
    low, high = (int(value) for value in torch.aminmax(targets))
    if low < 0 or high >= num_classes:
        raise ArgumentError(f"{expected} Found {low if low < 0 else high}.")


def refuse_batch_tables(model: nn.Module) -> None:
    """Refuses models whose gradients would carry other examples' data.

    Raises:
        ArgumentError: A guide's table is made from the batches.
    """
    for path, module in model.named_modules():
        if isinstance(module, Guide) and module.guidance.table_from == "batch":
            raise ArgumentError(
                f"The table of `{path or type(module).__name__}` is made from the batches' targets: it carries other "
                "examples' data into every example's gradient, which clipping does not bound. Pass "
                '`table_from="given"` to `guide_logits`, and feed it by `guide.update(logits, targets)` from public '
                "data, or by updates whose privacy you account for."
            )


__all__ = ["Guide", "of_targets", "refuse_batch_tables", "stack_pathways"]
