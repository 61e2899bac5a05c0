"""What a check found, as values.

Promises: `str(result)` is a small table that names everything that failed; a result is true where nothing did.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROWS = 12
"""Parameters that agree and are listed one by one; of the others the worst is named."""

_MIXED = 5
"""Pairs of examples that are listed."""


@dataclass(frozen=True)
class Verdict:
    """One quantity that was compared.

    Attributes:
        name: What it is.
        error: The largest relative error.
        reason: What is wrong; "" where it agrees.
    """

    name: str
    error: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it agrees."""
        return not self.reason

    def cells(self) -> tuple[str, ...]:
        """As printed."""
        return self.name, f"{self.error:.1e}", "", self.reason or "ok"


@dataclass(frozen=True)
class ParameterVerdict(Verdict):
    """One parameter.

    Attributes:
        clipped_error: The relative error of what one backward adds to its `.grad`.
    """

    clipped_error: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """As printed."""
        return self.name, f"{self.error:.1e}", f"{self.clipped_error:.1e}", self.reason or "ok"


@dataclass(frozen=True)
class Mixed:
    """One example moves another.

    Attributes:
        output: Which tensor of the output.
        changed: The example whose input was changed.
        moved: The example whose output moved; None: a value that belongs to no example.
        size: By how much, in units of the output.
    """

    output: str
    changed: int
    moved: int | None
    size: float

    def __str__(self) -> str:
        whose = "which belongs to no example" if self.moved is None else f"of example {self.moved}"
        return f"changing example {self.changed} moves `{self.output}` {whose} by {self.size:.1e}"


@dataclass(frozen=True)
class CheckResult:
    """What a check found. It is true where everything agrees; `str(result)` is a table.

    Attributes:
        examples: How many examples were compared.
        reference: What they were compared with.
        mode: The mode that was checked: "train", "eval", or "as set" where modules differ.
        tolerance: The largest relative error taken for rounding.
        outputs: The forward of all examples together against that of each alone.
        loss: The loss of all against the losses of each; None with the built-in loss.
        norms: The norms of the per-example gradients, and whether the clip factors follow from them.
        parameters: Per-example gradients, and the clipped sum.
        mixing: Examples that move the outputs of others.
        notes: What else is worth knowing.
    """

    examples: int
    reference: str
    mode: str
    tolerance: float
    outputs: Verdict
    loss: Verdict | None = None
    norms: Verdict | None = None
    parameters: tuple[ParameterVerdict, ...] = ()
    mixing: tuple[Mixed, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All of them."""
        return tuple(v for v in (self.outputs, self.loss, self.norms, *self.parameters) if v is not None)

    @property
    def ok(self) -> bool:
        """Whether everything agrees and no example moves another."""
        return all(verdict.ok for verdict in self.verdicts) and not self.mixing

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        title = (
            f"perexfx check: {'ok' if self.ok else 'FAILED'}, {self.examples} examples one at a time by "
            f"{self.reference}, {self.mode} mode, tolerance {self.tolerance:.0e}"
        )
        lines = [title, "", *_table(self._rows()), ""]
        if self.mixing:
            lines += [str(mixed) for mixed in self.mixing[:_MIXED]]
            if len(self.mixing) > _MIXED:
                lines.append(f"... and {len(self.mixing) - _MIXED} more pairs of examples")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines).rstrip()

    def _rows(self) -> list[tuple[str, ...]]:
        agreeing = [verdict for verdict in self.parameters if verdict.ok]
        hidden = agreeing[_ROWS:] if len(agreeing) > _ROWS + 1 else []
        rows = [("", "error", "in .grad", "verdict")]
        rows += [verdict.cells() for verdict in self.verdicts if verdict not in hidden]
        if hidden:
            worst = (max(v.error for v in hidden), max(v.clipped_error for v in hidden))
            rows.append((f"{len(hidden)} more parameters", *(f"{error:.1e}" for error in worst), "ok"))
        return rows


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join((row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:3], widths[1:], strict=True)), row[3]))
        for row in rows
    ]
