"""What a strategy costs, in counts that depend on shapes alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Work of one kind, as a machine profile knows it.

    Attributes:
        kind: A key of `perexfx.ir.cost_model.Machine.rates`.
        flops: Floating-point operations; one multiply-add is two.
        bytes: Bytes read and written.
        calls: How many kernels are started.
    """

    kind: str
    flops: int = 0
    bytes: int = 0
    calls: int = 1


@dataclass(frozen=True)
class Cost:
    """What one strategy costs at one site, beyond an ordinary step without parameter gradients.

    Attributes:
        work: From the output gradient to the parameter's clipped sum.
        bytes_held: Kept alive from the site's backward until the clip node.
        bytes_transient: The most that is alive for a moment on top of that, while the norms are formed.
        bytes_summing: The same while the clipped sum is formed, without the sum itself.
        holds_factors: Whether what is held are the factors as the backward left them, whose memory others may share.
    """

    work: tuple[Work, ...]
    bytes_held: int
    bytes_transient: int = 0
    bytes_summing: int = 0
    holds_factors: bool = False

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return sum(work.flops for work in self.work)
