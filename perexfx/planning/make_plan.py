"""Planning: sites, strategies and machine to a plan, from shapes alone.

Promises: every operand of every site takes the least predicted time, what the user asks for aside; a plan is the same
for the same shapes. What is asked for and does not exist, or does not apply, is an error that says what does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from perexfx.ir.alternative import Alternative
from perexfx.ir.errors import ArgumentError, StrategyError
from perexfx.ir.factors import Signature
from perexfx.ir.refusal import Refusal
from perexfx.ir.rule import Fitted
from perexfx.ir.site import Site, are_joined, grouped
from perexfx.ir.strategy import REWEIGHT, Strategy
from perexfx.planning.candidates import Alternatives, no_second_run
from perexfx.planning.plan import Decision, Footprint, Plan
from perexfx.sites import Segment


def make_plan(
    sites: Sequence[Site],
    fitted: Mapping[str, Fitted],
    alternatives: Alternatives,
    *,
    forced: str | Mapping[str, str] = "auto",
    channels_last: frozenset[int] = frozenset(),
    segments: Sequence[Segment] = (),
    footprint: Footprint | None = None,
) -> Plan:
    """The cheapest strategy for every operand of every site.

    Args:
        sites: In graph order.
        fitted: Site name -> the site at its shapes.
        alternatives: The strategies to choose from.
        forced: "auto", one strategy's name, or {site name: strategy name}.
        channels_last: The regions that use that format.
        segments: The parts of the graph that may run a second time.
        footprint: Predicts the plan's memory.

    Raises:
        StrategyError: A forced strategy does not exist, or does not apply.
    """
    check_forced(sites, alternatives.strategies, forced)
    rows, segments = _with_second_runs(_rows(sites, fitted, alternatives, forced), alternatives, segments)
    _check_applicable(rows, forced)
    decisions = []
    for row in rows:
        chosen = min(row.candidates, key=lambda a: a.seconds)
        found, is_first = fitted[row.site.name], row.operand == row.site.operands[0].name
        own = alternatives.own_seconds(found) if is_first else 0.0
        name, kind = row.site.name, found.rule.kind
        ordinary = alternatives.ordinary_seconds(row.signature)
        decisions.append(
            Decision(name, row.operand, kind, row.signature, chosen, row.alternatives, row.reason, own, ordinary)
        )
    n = next(iter(fitted.values())).geometry.n if fitted else 0
    return Plan(
        n,
        tuple(decisions),
        fitted,
        alternatives.machine.name,
        channels_last=channels_last,
        segments=tuple(segments),
        footprint=footprint,
    )


@dataclass(frozen=True)
class _Row:
    """One operand of one site, before a choice is made.

    Attributes:
        wanted: Name of the strategy that the user asks for.
        joined: Why its per-example gradients must be formed; "" where they need not.
    """

    site: Site
    operand: str
    signature: Signature
    alternatives: tuple[Alternative, ...]
    wanted: str | None
    joined: str

    @property
    def forced(self) -> Alternative | None:
        """The alternative asked for, where it applies."""
        return next((a for a in self.alternatives if a.strategy.name == self.wanted and a.cost), None)

    @property
    def candidates(self) -> list[Alternative]:
        """What may be chosen."""
        if self.joined:
            return [a for a in self.alternatives if a.strategy.name == "materialize"]
        if self.forced:
            return [self.forced]
        return [a for a in self.alternatives if a.cost and not a.is_second_run]

    @property
    def reason(self) -> str:
        """Why there is no choice."""
        if self.joined:
            return self.joined
        if self.wanted is None:
            return ""
        return "forced" if self.forced else f"{self.wanted} does not apply"


def _rows(
    sites: Sequence[Site],
    fitted: Mapping[str, Fitted],
    alternatives: Alternatives,
    forced: str | Mapping[str, str],
) -> list[_Row]:
    """What there is to choose from by itself."""
    joined, rows = _joined(sites), []
    for site in sites:
        for operand in site.operands:
            signature = fitted[site.name].signatures[operand.name]
            wanted = _wanted(site, forced)
            if operand is not site.operands[0] and (wanted != REWEIGHT or not alternatives.norms_alone(signature)):
                wanted = None
            rows.append(_Row(site, operand.name, signature, alternatives.of(signature), wanted, joined[site.name]))
    return rows


def _with_second_runs(
    rows: Sequence[_Row], alternatives: Alternatives, segments: Sequence[Segment]
) -> tuple[list[_Row], list[Segment]]:
    """And what goes for a whole segment; its operands share the time, those asked for or else all that may."""
    by_site = {site: segment for segment in segments for site in segment.sites}
    asked, able, factored = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        segment, norms = by_site.get(row.site.name), alternatives.norms_alone(row.signature)
        if segment is None:
            continue
        factored[segment.exit] += norms is not None
        if not no_second_run(segment, norms, row.joined):
            able[segment.exit] += 1
            asked[segment.exit] += row.wanted == REWEIGHT
    found = []
    for row in rows:
        segment = by_site.get(row.site.name)
        share = 1 if segment is None else asked[segment.exit] or able[segment.exit]
        own = alternatives.reweighted(row.signature, segment, share, row.joined)
        found.append(replace(row, alternatives=(*row.alternatives, own)))
    return found, [replace(s, is_bridge=not s.refusal and not factored[s.exit]) for s in segments]


def _joined(sites: Sequence[Site]) -> dict[str, str]:
    """Site name -> why its per-example gradients must be formed; "" where they need not."""
    reasons = {}
    for members in grouped(sites).values():
        must = are_joined(members)
        for site in members:
            others = ", ".join(other.name for other in members if other is not site)
            shared = f"joined with {others}" if others else "pulled back to its parameters"
            reasons[site.name] = shared if must else ""
    return reasons


def _wanted(site: Site, forced: str | Mapping[str, str]) -> str | None:
    name = forced if isinstance(forced, str) else forced.get(site.name, "auto")
    return None if name == "auto" else name


def check_forced(sites: Sequence[Site], strategies: Sequence[Strategy], forced: str | Mapping[str, str]) -> None:
    """That every strategy and site named by the user exists.

    Raises:
        StrategyError: One does not.
    """
    known = ["auto", *(strategy.name for strategy in strategies), REWEIGHT]
    if not isinstance(forced, str | Mapping):
        raise ArgumentError(
            f"`strategy` should be one of {', '.join(known)}, or a dict from site to strategy. Found {forced!r}."
        )
    names = [site.name for site in sites]
    asked = {"": forced} if isinstance(forced, str) else forced
    refusals = [
        Refusal(f"There is no strategy {name!r}.", f"The strategies are {', '.join(known)}.")
        for name in asked.values()
        if name not in known
    ]
    refusals += [
        Refusal(f"There is no site {site!r}.", f"The sites are {', '.join(names)}.")
        for site in asked
        if site and site not in names
    ]
    if refusals:
        raise StrategyError(refusals)


def _check_applicable(rows: Sequence[_Row], forced: str | Mapping[str, str]) -> None:
    """A strategy asked for at one site must apply there; one asked for everywhere, at some site at least."""
    impossible = [row for row in rows if row.wanted and (row.forced is None or row.joined)]
    if isinstance(forced, str) and any(row.wanted and row.forced and not row.joined for row in rows):
        return
    refusals = []
    for row in impossible:
        refusal = next(a.refusal for a in row.alternatives if a.strategy.name == row.wanted)
        if row.joined and row.wanted == "materialize":
            continue
        applicable = [a.strategy.name for a in row.alternatives if a.cost] if not row.joined else ["materialize"]
        refusals.append(
            Refusal(
                what=f"Strategy {row.wanted!r} does not apply to site `{row.site.name}` at {row.site.place}: "
                f"{row.joined or refusal}.",
                why=f"The site is {row.site.kind}, {row.signature.describe()}.",
                remedy=f"Applicable are {', '.join(applicable)}.",
                place=row.site.place,
            )
        )
    if refusals:
        raise StrategyError(refusals)


__all__ = ["check_forced", "make_plan"]
