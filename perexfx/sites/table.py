"""The sites of a graph as a step looks them up: by name, by group, by the parameters that are trained.

Promises: it follows from the sites alone and never changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from perexfx.ir.site import Key, Operand, Site, are_joined, grouped


class SiteTable:
    """All sites of one graph.

    Attributes:
        sites: In graph order.
        groups: The sites that share parameters, by the name of the first.
        joined: Names of the groups whose per-example gradients must be added before their norm is taken.
        evaluated: Names of the parameters whose expressions are evaluated again in a backward.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = tuple(sites)
        self.groups = grouped(self.sites)
        self.joined = frozenset(name for name, members in self.groups.items() if are_joined(members))
        self.evaluated = frozenset(
            name
            for site in self.sites
            for operand in site.operands
            if operand.expression.function is not None
            for name in operand.expression.parameters
        )
        self._by_name = {site.name: site for site in self.sites}
        self._active: tuple[frozenset[str], dict[str, frozenset[str]]] | None = None

    def site(self, name: str) -> Site:
        """A site by name."""
        return self._by_name[name]

    def operand(self, key: Key) -> Operand:
        """An operand of a site."""
        return next(operand for operand in self.site(key[0]).operands if operand.name == key[1])

    def first_user(self, parameter: str) -> Site:
        """The first site that a parameter is used by."""
        return next(site for site in self.sites if parameter in site.parameters)

    def is_joined(self, group: str, active: frozenset[str]) -> bool:
        """Whether the per-example gradients of a group must be added before their norm is taken.

        Args:
            group: Its name.
            active: Names of the parameters that are trained. Of an expression of several whose norm tells that of all
                of them, all must be.
        """
        if group in self.joined:
            return True
        several = [operand.expression.parameters for site in self.groups[group] for operand in site.operands]
        return any(len(set(names) & active) not in (0, len(names)) for names in several if len(names) > 1)

    def is_alone(self, group: str) -> bool:
        """Whether a group is one site."""
        return len(self.groups[group]) == 1

    def active_operands(self, parameters: frozenset[str]) -> Mapping[str, frozenset[str]]:
        """Site -> names of its operands that depend on some of these parameters."""
        if self._active is None or self._active[0] != parameters:
            found = {
                site.name: frozenset(o.name for o in site.operands if parameters.intersection(o.expression.parameters))
                for site in self.sites
            }
            self._active = parameters, found
        return self._active[1]


__all__ = ["SiteTable"]
