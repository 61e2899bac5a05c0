"""What an exported model says about itself: plain text, the same for the same plan."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

from perexfx.ir.site import Site
from perexfx.planning import Plan
from perexfx.runtime import Settings


def of_site(site: Site, plan: Plan) -> dict[str, str]:
    """What was decided for a site, and where it is in the user's model."""
    decisions = [decision for decision in plan.decisions if decision.site == site.name]
    return {
        "perexfx.site": site.name,
        "perexfx.kind": decisions[0].kind,
        "perexfx.strategy": decisions[0].chosen.strategy.name,
        "perexfx.predicted_seconds": f"{sum(decision.seconds for decision in decisions):.3e}",
        "perexfx.predicted_bytes": str(sum(decision.chosen.bytes_held for decision in decisions)),
        "perexfx.parameters": ", ".join(site.parameters),
        "perexfx.group": site.group,
        "perexfx.module": site.place.module,
        "perexfx.source": site.place.source,
    }


def of_norm(group: str) -> dict[str, str]:
    """The group of sites whose squared norms join the total."""
    return {"perexfx.group": group}


def of_clip(settings: Settings) -> dict[str, str]:
    """How gradients are clipped."""
    kind = settings.clipping if isinstance(settings.clipping, str) else "user-defined"
    return {
        "perexfx.clip_norm": "none" if settings.clip_norm is None else repr(settings.clip_norm),
        "perexfx.clipping": kind,
        "perexfx.loss_reduction": settings.loss_reduction,
    }


def of_model(graph: str, settings: Settings, plan: Plan) -> dict[str, str]:
    """What was planned, for which batch size and machine."""
    strategies = {f"{d.site}:{d.operand}": d.chosen.strategy.name for d in plan.decisions}
    return {
        "perexfx.version": _version(),
        "perexfx.graph": graph,
        "perexfx.batch_size": str(plan.batch_size),
        "perexfx.machine": plan.machine,
        "perexfx.predicted_seconds": f"{plan.seconds:.3e}",
        "perexfx.predicted_bytes_added": str(plan.bytes_added),
        "perexfx.strategies": json.dumps(strategies),
        **of_clip(settings),
    }


def _version() -> str:
    try:
        return version("perexfx")
    except PackageNotFoundError:  # runs from a checkout
        return "unknown"


__all__ = ["of_clip", "of_model", "of_norm", "of_site"]
