"""Reading: what has been recorded of entries, in the database and in the artifact store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import select

from registry.artifacts import Artifact, ArtifactStore
from registry.bitmaps import Numbering, neurons_of, read
from registry.database import Database
from registry.queries import chain_rows, entry_of_input, named_entry
from registry.records import Entry
from registry.schema import EntryRow, NeuronSetRow, NeuronSpaceRow, TaskRow

# torch takes seconds to import; only what reads tensors imports it, when it does.
if TYPE_CHECKING:
    from neft.memory import Memory
    from neft.neurons import NeuronSet
    from neft.overlay import Overlay
    from neft.routing import Signature
    from neft.scoring import Scores

_T = TypeVar("_T")


class Reading:
    """Finds entries, and reads their neurons and their files."""

    _database: Database
    _artifacts: ArtifactStore

    # Entries

    def find(self, input_digest: str) -> Entry | None:
        """The entry that was made from these inputs, if it has been recorded."""
        with self._database.reading() as session:
            row = entry_of_input(session, input_digest)
            return Entry.from_row(row) if row else None

    def get(self, task: str, version: int | None = None, base_model: str | None = None) -> Entry:
        """A task's entry, the newest unless a version is asked for.

        Args:
            task: its name, `name@version`, or `name@alias`.
            version: the version, 1 and up.
            base_model: its name, or how its fingerprint begins; needed when the task was learnt on several.

        Raises:
            InputError: no such task, version or alias, or several base models.
        """
        with self._database.reading() as session:
            return Entry.from_row(named_entry(session, task, version, base_model))

    def list(self, stream: str | None = None, task: str | None = None) -> Sequence[Entry]:
        """All entries, in the order they were recorded, of one stream or task where one is given."""
        query = select(EntryRow).order_by(EntryRow.id)
        if stream is not None:
            query = query.where(EntryRow.stream == stream)
        if task is not None:
            query = query.join(TaskRow).where(TaskRow.name == task)
        with self._database.reading() as session:
            return [Entry.from_row(row) for row in session.scalars(query)]

    def chain(self, entry: Entry) -> Sequence[Entry]:
        """The entry and all it was built on, root first."""
        with self._database.reading() as session:
            return [Entry.from_row(row) for row in chain_rows(session, entry.id)]

    def ends(self, entry: Entry) -> Sequence[Entry]:
        """The last entries of all chains that go on from an entry, oldest first; itself where none does."""
        with self._database.reading() as session:
            children: dict[int, list[int]] = {}
            for child, parent in session.execute(
                select(EntryRow.id, EntryRow.parent_id).where(EntryRow.parent_id.is_not(None))
            ):
                children.setdefault(parent, []).append(child)
            found, reached = [], [entry.id]
            while reached:
                last = reached.pop()
                reached += children.get(last, [])
                if last not in children:
                    found.append(last)
            rows = [session.get_one(EntryRow, each) for each in sorted(found)]
            return [Entry.from_row(row) for row in rows]

    # Their neurons and files

    def neurons(self, entry: Entry) -> NeuronSet:
        """The entry's neuron set.

        Raises:
            FailedError: it is damaged.
        """
        from neft.neurons import NeuronSpace

        with self._database.reading() as session:
            row = session.get_one(NeuronSetRow, entry.id)
            described = session.get_one(NeuronSpaceRow, row.space_fingerprint).description
        numbering = Numbering.of(row.space_fingerprint, described)
        return neurons_of(read(row.bitmap, numbering, entry.reference), NeuronSpace.from_dict(described), numbering)

    def overlay(self, entry: Entry) -> Overlay:
        """
        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.overlay import Overlay

        return Overlay.load(self._artifacts.fetch(entry.overlay_file, entry.reference), verified=True)

    def scores(self, entry: Entry) -> Scores | None:
        """The scores the set was chosen by, if they were recorded.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.scoring import Scores

        return self._loaded(entry.scores_file, entry, Scores.load)

    def memory(self, entry: Entry) -> Memory | None:
        """What the protection policy keeps of the task, if it keeps anything.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.memory import Memory

        return self._loaded(entry.memory_file, entry, Memory.load)

    def signature(self, entry: Entry) -> Signature | None:
        """What tells the task's inputs from others', if it was recorded.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.routing import Signature

        return self._loaded(entry.signature_file, entry, Signature.load)

    def _loaded(self, file: Artifact | None, entry: Entry, load: Callable[[Path], _T]) -> _T | None:
        """What an entry's file holds, if it has one."""
        return None if file is None else load(self._artifacts.fetch(file, entry.reference))
