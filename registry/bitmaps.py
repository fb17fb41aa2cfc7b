"""Bitmaps: neuron sets as roaring bitmaps (arXiv 1402.6407) of a space's neurons, numbered through its sites in order.

Look-ups work on these alone, without torch: on ten thousand sets at once, in memory, or in the database.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pyroaring import BitMap, FrozenBitMap

from neft.errors import FailedError, NotFoundError, nearest

if TYPE_CHECKING:
    from neft.neurons import NeuronSet, NeuronSpace

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SiteRange:
    """One site's neurons, numbered `start` to `start + size - 1` in its space's bitmaps."""

    name: str
    kind: str
    layer: int
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Numbering:
    """How the neurons of a space are numbered: site after site, in the space's order."""

    fingerprint: str
    sites: tuple[SiteRange, ...]

    @classmethod
    def of(cls, fingerprint: str, description: Mapping[str, Any]) -> Numbering:
        """The numbering of a space, from `NeuronSpace.to_dict`."""
        ranges, start = [], 0
        for site in description["sites"]:
            layer = next((int(part) for part in site["name"].split(".") if part.isdecimal()), 0)
            ranges.append(SiteRange(site["name"], site["kind"], layer, start, site["size"]))
            start += site["size"]
        return cls(fingerprint, tuple(ranges))

    def __len__(self) -> int:
        return self.sites[-1].stop if self.sites else 0

    @cached_property
    def _by_name(self) -> Mapping[str, SiteRange]:
        return {site.name: site for site in self.sites}

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.array([site.start for site in self.sites], dtype=np.int64)

    def has(self, site: str) -> bool:
        """Whether there is a site of that name."""
        return site in self._by_name

    def site(self, name: str) -> SiteRange:
        """
        Raises:
            InputError: no site of that name.
        """
        if name not in self._by_name:
            raise NotFoundError(f"no site {name!r} in this neuron space; {nearest(name, self._by_name)}")
        return self._by_name[name]

    def number(self, site: str, neuron: int) -> int:
        """The number of a neuron of a site.

        Raises:
            InputError: no such site, or no such neuron in it.
        """
        found = self.site(site)
        if not 0 <= neuron < found.size:
            raise NotFoundError(f"site {site!r} has neurons 0 to {found.size - 1}, so there is no neuron {neuron}")
        return found.start + neuron

    def neuron(self, number: int) -> tuple[str, int]:
        """Site and index of a number."""
        site = self.sites[int(np.searchsorted(self._starts, number, side="right")) - 1]
        return site.name, number - site.start

    def by_site(self, bitmap: BitMap | FrozenBitMap) -> Iterator[tuple[SiteRange, Indices]]:
        """Every site that has neurons in the bitmap, with their sorted indices."""
        numbers = np.array(bitmap.to_array(), dtype=np.int64)
        bounds = np.searchsorted(numbers, [*self._starts, len(self)])
        for site, first, last in zip(self.sites, bounds[:-1], bounds[1:], strict=True):
            if first < last:
                yield site, numbers[first:last] - site.start

    def counts(self, bitmap: BitMap | FrozenBitMap) -> dict[str, int]:
        """Site name -> how many of its neurons are in the bitmap; sites without any are left out."""
        found = {site.name: bitmap.range_cardinality(site.start, site.stop) for site in self.sites}
        return {name: count for name, count in found.items() if count}


def bitmap_of(neurons: NeuronSet) -> FrozenBitMap:
    """The bitmap of a neuron set."""
    numbers = BitMap()
    start = 0
    for site in neurons.space.sites:
        numbers.update((neurons[site.name] + start).astype(np.uint32))
        start += site.size
    numbers.run_optimize()
    return FrozenBitMap(numbers)


def neurons_of(bitmap: BitMap | FrozenBitMap, space: NeuronSpace, numbering: Numbering) -> NeuronSet:
    """The neuron set of a bitmap."""
    from neft.neurons import NeuronSet

    return NeuronSet(space, {site.name: indices for site, indices in numbering.by_site(bitmap)})


def written(bitmap: FrozenBitMap) -> bytes:
    """A bitmap as the database keeps it, in roaring's portable format."""
    content: bytes = bitmap.serialize()
    return content


def read(content: bytes, numbering: Numbering, owner: str) -> FrozenBitMap:
    """A bitmap as `written` has it.

    Args:
        owner: the entry it belongs to, for the message.

    Raises:
        FailedError: it is damaged, or numbers more neurons than the space has.
    """
    try:
        found = FrozenBitMap.deserialize(content)
    except (ValueError, IndexError) as error:  # the latter where there is not a byte
        raise FailedError(
            f"the neurons of {owner} are damaged ({error}); restore the database from a copy, or learn the task again"
        ) from error
    if found and found.max() >= len(numbering):
        raise FailedError(
            f"the neurons of {owner} are damaged: number {found.max()} is outside its space of {len(numbering)}; "
            "restore the database from a copy, or learn the task again"
        )
    return found


def union_of(bitmaps: Sequence[BitMap | FrozenBitMap]) -> BitMap:
    """Everything that is in any of them."""
    return BitMap.union(*map(BitMap, bitmaps)) if bitmaps else BitMap()
