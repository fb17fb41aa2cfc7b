"""Capacity: how many neurons are free at each site, before and after a task takes its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neft.neurons import NeuronSpace
from neft.selection import Selection


@dataclass(frozen=True)
class Capacity:
    """What a selection leaves of the neurons that may be chosen.

    Attributes:
        free: site name -> neurons free before and after, of the sites that may be chosen from.
        sizes: site name -> neurons in all.
    """

    free: Mapping[str, tuple[int, int]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, selection: Selection, space: NeuronSpace) -> Capacity:
        """The capacity that `selection` was made from."""
        return cls(selection.capacity, {site.name: site.size for site in space.sites})

    @property
    def left(self) -> int:
        """Neurons free after the choice."""
        return sum(after for _, after in self.free.values())

    @property
    def fullest(self) -> tuple[str, float]:
        """The site with the smallest share of its neurons free after the choice, and that share."""
        shares = {name: after / self.sizes[name] for name, (_, after) in self.free.items()}
        name = min(shares, key=lambda each: shares[each])
        return name, shares[name]

    def table(self) -> dict[str, list[str | int]]:
        """A row a site, by columns."""
        return {
            "site": [*self.free],
            "size": [self.sizes[name] for name in self.free],
            "free before": [before for before, _ in self.free.values()],
            "free after": [after for _, after in self.free.values()],
        }
