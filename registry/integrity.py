"""Integrity: whether a registry is whole, and the removal of files that belong to nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from neft.errors import FailedError
from registry.artifacts import Artifact, ArtifactStore, Fault, Stored
from registry.bitmaps import Numbering, read
from registry.database import Database
from registry.records import Entry
from registry.schema import EntryRow, NeuronSetRow, NeuronSpaceRow, now

#: What a writer leaves when it is killed: what it has not yet put in its place, and the folder for that.
_HALF_WRITTEN = re.compile(r"(\.incoming-.*|[0-9a-f]{2}/\.[0-9a-f]{64}\.safetensors\..*)", re.DOTALL)
_FILES = (EntryRow.overlay_sha256, EntryRow.scores_sha256, EntryRow.memory_sha256, EntryRow.signature_sha256)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong: a file, or the neurons of an entry, and the entries that cannot be read for it."""

    what: Literal["file", "neurons"]
    fault: Fault
    name: str
    entries: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} of {', '.join(self.entries)} is {self.fault}"


@dataclass(frozen=True)
class Orphan:
    """A file in the store that no entry names.

    `orphan`: stored, but its entry was never recorded. `half-written`: what a writer left that was killed. `foreign`:
    not written by a registry, which nothing here will remove.
    """

    path: str
    kind: Literal["orphan", "half-written", "foreign"]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What `Registry.verify` has found."""

    entries: int
    files: int
    bytes: int
    problems: tuple[Problem, ...]
    orphans: tuple[Orphan, ...]

    @property
    def whole(self) -> bool:
        """Whether every entry can be read."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self) | {"whole": self.whole}


@dataclass(frozen=True)
class Removed:
    """What `Registry.gc` has removed, or would."""

    orphans: tuple[Orphan, ...]
    dry_run: bool

    @property
    def bytes(self) -> int:
        return sum(orphan.bytes for orphan in self.orphans)

    def to_dict(self) -> dict[str, Any]:
        """What was removed as JSON has it."""
        return asdict(self) | {"bytes": self.bytes}


def verify(database: Database, artifacts: ArtifactStore, deep: bool) -> Report:
    """`Registry.verify`."""
    # Listed first: what is written meanwhile is then in the database, and no orphan, by the time that is read.
    stored = list(artifacts.stored())
    with database.reading() as session:
        entries = [Entry.from_row(row) for row in session.scalars(select(EntryRow).order_by(EntryRow.id))]
        neurons = tuple(_damaged_neurons(session, entries))
    owners: dict[Artifact, list[str]] = {}
    for entry in entries:
        for file in entry.files:
            owners.setdefault(file, []).append(entry.reference)
    files = tuple(
        Problem("file", fault, f"{file.name} {file.sha256}", tuple(references))
        for file, references in owners.items()
        if (fault := artifacts.fault(file, deep)) is not None
    )
    named = {file.sha256: file.bytes for file in owners}
    orphans = tuple(_orphan(each) for each in stored if each.sha256 not in named)
    return Report(len(entries), len(named), sum(named.values()), files + neurons, orphans)


def _damaged_neurons(session: Session, entries: Sequence[Entry]) -> Iterator[Problem]:
    """The entries whose neurons are missing, damaged, or not as many as was recorded."""
    spaces = {
        row.fingerprint: Numbering.of(row.fingerprint, row.description)
        for row in session.scalars(select(NeuronSpaceRow))
    }
    for entry in entries:
        row = session.get(NeuronSetRow, entry.id)
        if row is None or row.space_fingerprint not in spaces:
            yield Problem("neurons", "missing", "the set of neurons", (entry.reference,))
            continue
        try:
            whole = len(read(row.bitmap, spaces[row.space_fingerprint], entry.reference)) == entry.neuron_count
        except FailedError:
            whole = False
        if not whole or row.space_fingerprint != entry.space_fingerprint:
            yield Problem("neurons", "altered", "the set of neurons", (entry.reference,))
        session.expunge(row)


def _orphan(stored: Stored) -> Orphan:
    if stored.sha256 is not None:
        return Orphan(stored.path, "orphan", stored.bytes)
    return Orphan(stored.path, "half-written" if _HALF_WRITTEN.fullmatch(stored.path) else "foreign", stored.bytes)


def gc(database: Database, artifacts: ArtifactStore, older_than: timedelta, dry_run: bool) -> Removed:
    """`Registry.gc`."""
    before = now() - older_than
    stored = [each for each in artifacts.stored() if each.written_at <= before]
    with database.reading() as session:
        named = {sha256 for row in session.execute(select(*_FILES)).tuples() for sha256 in row if sha256 is not None}
    removed = []
    for each in stored:
        orphan = _orphan(each)
        if orphan.kind == "foreign" or each.sha256 in named or _is_named(database, each.sha256):
            continue
        # A writer that stores the same content now writes the file anew, and the store does not remove it then.
        if dry_run or artifacts.remove(each):
            removed.append(orphan)
    return Removed(tuple(removed), dry_run)


def _is_named(database: Database, sha256: str | None) -> bool:
    """Whether an entry has a file of that content, as of this moment."""
    query = select(EntryRow.id).where(or_(*(column == sha256 for column in _FILES))).limit(1)
    with database.reading() as session:
        return sha256 is not None and session.scalar(query) is not None
