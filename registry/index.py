"""The index: the bitmaps of a neuron space's entries, kept in memory once they were read, since they never change."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.bitmaps import Indices, Numbering, read
from registry.schema import EntryRow, NeuronSetRow, NeuronSpaceRow, TaskRow

if TYPE_CHECKING:
    from pyroaring import FrozenBitMap

#: Sets that are read at once: a set of a 7B model is some 50 kB.
_AT_ONCE = 500


@dataclass(frozen=True)
class Held:
    """What is held of a space's entries: the same place everywhere is the same entry.

    Attributes:
        bases: ids of the entries' base models: models of one shape have one space.
        sizes: int64, how many neurons each owns.
    """

    numbering: Numbering
    ids: tuple[int, ...] = ()
    bases: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    sizes: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    bitmaps: tuple[FrozenBitMap, ...] = ()

    def place(self, entry_id: int) -> int:
        """Where the entry of that id stands."""
        return self.ids.index(entry_id)


class Index:
    """The bitmaps of every space that has been asked for; safe to use from several threads."""

    def __init__(self) -> None:
        self._spaces: dict[str, Held] = {}
        self._numberings: dict[str, Numbering] = {}
        self._lock = threading.Lock()

    def numbering(self, session: Session, space: str) -> Numbering:
        """How a recorded space is numbered."""
        if space not in self._numberings:
            described = session.get_one(NeuronSpaceRow, space).description
            self._numberings[space] = Numbering.of(space, described)
        return self._numberings[space]

    def held(self, session: Session, space: str) -> Held:
        """The space's entries, with those that were recorded since it was asked for last.

        Raises:
            FailedError: a set is damaged.
        """
        with self._lock:
            found = self._spaces.get(space) or Held(self.numbering(session, space))
            # Sets are never taken away, so where there are as many as are held, they are those.
            count = select(func.count()).where(NeuronSetRow.space_fingerprint == space)
            if session.scalar(count) != len(found.ids):
                found = _with_new(found, session)
            self._spaces[space] = found
            return found


def _with_new(held: Held, session: Session) -> Held:
    """What is held, and what is not yet; new entries may have any ids, for those are no order of commits."""
    known = set(held.ids)
    stored = session.scalars(
        select(NeuronSetRow.entry_id)
        .where(NeuronSetRow.space_fingerprint == held.numbering.fingerprint)
        .order_by(NeuronSetRow.entry_id)
    )
    new = [
        (entry_id, base, task, f"{task}@{version}", read(content, held.numbering, f"{task}@{version}"))
        for entry_id, base, task, version, content in _rows(session, [each for each in stored if each not in known])
    ]
    if not new:
        return held
    ids, bases, tasks, references, bitmaps = zip(*new, strict=True)
    return replace(
        held,
        ids=held.ids + ids,
        bases=held.bases + bases,
        tasks=held.tasks + tasks,
        references=held.references + references,
        sizes=np.concatenate([held.sizes, np.array([len(each) for each in bitmaps], dtype=np.int64)]),
        bitmaps=held.bitmaps + bitmaps,
    )


def _rows(session: Session, ids: Sequence[int]) -> Iterator[tuple[int, int, str, int, bytes]]:
    query = (
        select(EntryRow.id, TaskRow.base_model_id, TaskRow.name, EntryRow.version, NeuronSetRow.bitmap)
        .join(TaskRow, EntryRow.task_id == TaskRow.id)
        .join(NeuronSetRow, NeuronSetRow.entry_id == EntryRow.id)
        .order_by(EntryRow.id)
    )
    for start in range(0, len(ids), _AT_ONCE):
        yield from session.execute(query.where(EntryRow.id.in_(ids[start : start + _AT_ONCE]))).tuples()
