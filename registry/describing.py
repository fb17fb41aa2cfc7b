"""Descriptions: one entry with all that is noted on it, for those who ask many times a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

from sqlalchemy import bindparam, func, literal, null, select, union_all
from sqlalchemy.orm import Session

from registry.bitmaps import Indices, read
from registry.database import Database
from registry.index import Index
from registry.queries import LARGEST_VERSION, named_entry, split_reference
from registry.records import Entry
from registry.schema import AliasRow, EntryRow, NeuronSetRow, TagRow, TaskRow

#: Entries whose unchanging part is kept in memory: some 10 kB each.
_KEPT = 2000

_TASK, _ENTRY, _ALIAS, _TAG = (row.__table__ for row in (TaskRow, EntryRow, AliasRow, TagRow))

# Built once: to build a statement takes longer than to run it.
_NAMED = select(_ENTRY.c.id).where(_TASK.c.name == bindparam("task"))
_NEWEST = select(func.max(_ENTRY.c.version)).where(_ENTRY.c.task_id == _TASK.c.id).correlate(_TASK).scalar_subquery()
#: Whether a version, an alias or nothing follows the task's name -> a row for each task of that name.
_WANTED = {
    int: _NAMED.select_from(
        _TASK.outerjoin(_ENTRY, (_ENTRY.c.task_id == _TASK.c.id) & (_ENTRY.c.version == bindparam("wanted")))
    ),
    str: _NAMED.select_from(
        _TASK.outerjoin(_ALIAS, (_ALIAS.c.task_id == _TASK.c.id) & (_ALIAS.c.name == bindparam("wanted"))).outerjoin(
            _ENTRY, _ENTRY.c.id == _ALIAS.c.entry_id
        )
    ),
    type(None): _NAMED.select_from(
        _TASK.outerjoin(_ENTRY, (_ENTRY.c.task_id == _TASK.c.id) & (_ENTRY.c.version == _NEWEST))
    ),
}
#: An entry's aliases, without a value, and its tags.
_NOTED = union_all(
    select(_ALIAS.c.name.label("name"), null().label("value"), literal(0).label("kind")).where(
        _ALIAS.c.entry_id == bindparam("entry")
    ),
    select(_TAG.c.key, _TAG.c.value, literal(1)).where(_TAG.c.entry_id == bindparam("entry")),
).order_by("name")


class Descriptions:
    """Entries as JSON has them, and their neurons without torch."""

    _database: Database
    _index: Index

    def describe(self, reference: str, base_model: str | None = None) -> Mapping[str, Any]:
        """An entry, its aliases and tags, and how many neurons it has in each site (`sites`); not to be changed.

        Args:
            reference: as `Registry.get` takes it.
            base_model: its name, or how its fingerprint begins; needed when the task was learnt on several.

        Raises:
            InputError: no such entry, or several base models.
            FailedError: its neurons are damaged.
        """
        with self._database.reading() as session:
            entry_id = _id_of(session, reference, base_model)
            noted = session.execute(_NOTED, {"entry": entry_id}).tuples().all()
        return self._unchanging(entry_id) | {
            "aliases": [name for name, _, kind in noted if kind == 0],
            "tags": {name: value for name, value, kind in noted if kind == 1},
        }

    def indices(self, entry: Entry) -> Mapping[str, Indices]:
        """Site -> the sorted indices of an entry's neurons in it; sites without any are left out.

        Raises:
            FailedError: they are damaged.
        """
        with self._database.reading() as session:
            numbering = self._index.numbering(session, entry.space_fingerprint)
            content = session.get_one(NeuronSetRow, entry.id).bitmap
        return {site.name: indices for site, indices in numbering.by_site(read(content, numbering, entry.reference))}

    @cached_property
    def _unchanging(self) -> Callable[[int], dict[str, Any]]:
        """All of an entry but what is noted on it: it never changes, so it is kept."""

        def unchanging(entry_id: int) -> dict[str, Any]:
            with self._database.reading() as session:
                entry = Entry.from_row(session.get_one(EntryRow, entry_id))
                numbering = self._index.numbering(session, entry.space_fingerprint)
                content = session.get_one(NeuronSetRow, entry_id).bitmap
            return entry.to_dict() | {"sites": numbering.counts(read(content, numbering, entry.reference))}

        return lru_cache(_KEPT)(unchanging)


def _id_of(session: Session, reference: str, base_model: str | None) -> int:
    """The id of `named_entry`; quickly where there is nothing to refuse or to choose.

    Raises:
        InputError: as `named_entry` has it.
    """
    task, wanted = split_reference(reference, None)
    if base_model is None and not (isinstance(wanted, int) and wanted > LARGEST_VERSION):
        parameters = {"task": task} if wanted is None else {"task": task, "wanted": wanted}
        found = session.scalars(_WANTED[type(wanted)], parameters).all()
        if len(found) == 1 and found[0] is not None:
            return int(found[0])
    return named_entry(session, reference, None, base_model).id
