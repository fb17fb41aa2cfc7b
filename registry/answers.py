"""What the look-ups answer: frozen values, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry.records import Entry

Link = Literal["parent", "reused from", "forgets"]


@dataclass(frozen=True)
class _Answer:
    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class TaskSummary(_Answer):
    """A task on one base model.

    Attributes:
        base_model: the fingerprint.
        versions: how many there are.
        newest: reference of the newest one.
        neurons: how many that one has.
        score: what it scored on its own task when it was learnt, if that was recorded.
        streams: every stream that learnt it, sorted.
        aliases: alias -> version.
        tags: every `key=value` that is noted on one of its versions, sorted.
    """

    name: str
    base_model: str
    base_model_name: str
    versions: int
    newest: str
    neurons: int
    score: float | None
    streams: tuple[str, ...]
    aliases: Mapping[str, int]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A page of what a search found; `next_token` asks for the next, and is None on the last."""

    entries: tuple[Entry, ...]
    next_token: str | None

    def to_dict(self) -> dict[str, Any]:
        """The page as JSON has it."""
        return {"entries": [entry.to_dict() for entry in self.entries], "next_token": self.next_token}


@dataclass(frozen=True)
class Owner(_Answer):
    """An entry that owns the neuron, or so many of the site's neurons, that was asked about."""

    entry: str
    task: str
    neurons: int


@dataclass(frozen=True)
class Overlap(_Answer):
    """What two entries' sets have in common, and what they have alone; `sites`: site -> neurons that both own."""

    first: str
    second: str
    shared: int
    only_first: int
    only_second: int
    iou: float
    sites: Mapping[str, int]


@dataclass(frozen=True)
class Near(_Answer):
    """An entry, and how near it is: intersection over union of the sets, or correlation of the scores."""

    entry: str
    task: str
    value: float


@dataclass(frozen=True)
class OverlapMatrix(_Answer):
    """Entries, and what each has in common with each: neurons, and intersection over union."""

    entries: tuple[str, ...]
    sizes: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    iou: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Difference(_Answer):
    """What the second of two entries has otherwise than the first.

    Attributes:
        added: site -> neurons that the second owns and the first does not.
        removed: site -> neurons that the first owns and the second does not.
        kept: neurons that both own.
        fields: dotted name of a field that differs -> the first's value and the second's; None where it has none.
    """

    first: str
    second: str
    added: Mapping[str, int]
    removed: Mapping[str, int]
    kept: int
    fields: Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class SiteCapacity(_Answer):
    """A site's neurons: who owns how many of them (reference -> neurons), and how many nobody does."""

    site: str
    layer: int
    kind: str
    size: int
    owners: Mapping[str, int]
    free: int


@dataclass(frozen=True)
class Lineage(_Answer):
    """An entry, and what came of it.

    Attributes:
        link: what the entry is to the one above it: built on it (`parent`), `reused from` it, or one that `forgets` it.
        children: an entry stands with all that came of it under its parent, or, where it has none, under what it was
            reused from; other links to it are children without children.
    """

    entry: str
    link: Link | None
    children: tuple[Lineage, ...]


@dataclass(frozen=True)
class Strong(_Answer):
    """A neuron that mattered to a task, its score, and whether the task's set has it."""

    site: str
    neuron: int
    score: float
    owned: bool
