"""Labels: what may be noted on entries that never change. Aliases name one of a task's entries, tags are free."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from neft.errors import InputError, NotFoundError, nearest
from registry.database import Database
from registry.queries import named_entry, named_task
from registry.records import Entry
from registry.schema import AliasRow, EntryRow, TagRow, now

_ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
#: Longest alias, key and value of a tag, in characters.
LONGEST_NAME, LONGEST_VALUE = 250, 5000


class Labels:
    """Aliases and tags, with the verbs of MLflow's model registry."""

    _database: Database

    def set_alias(self, task: str, alias: str, version: int | None = None, base_model: str | None = None) -> Entry:
        """Let an alias of a task name an entry, whatever it has named before; `task@alias` finds it.

        Args:
            task: the task, or what `Registry.get` takes; its newest version, unless one is named.
            alias: letters, digits, `.`, `_` and `-`, a letter first.

        Raises:
            InputError: an alias that cannot be written after `@`, or no such entry.
        """
        if not _ALIAS.fullmatch(alias) or len(alias) > LONGEST_NAME:
            raise InputError(
                f"alias {alias!r} cannot be used; begin with a letter, go on with letters, digits, '.', '_' and '-', "
                f"{LONGEST_NAME} characters at most"
            )

        def work(session: Session) -> Entry:
            entry = named_entry(session, task, version, base_model)
            row = session.get(AliasRow, (entry.task_id, alias), with_for_update=True)
            if row is None:
                session.add(AliasRow(task_id=entry.task_id, name=alias, entry_id=entry.id))
            else:
                row.entry_id, row.moved_at = entry.id, now()
            return Entry.from_row(entry)

        return self._database.write(work)

    def delete_alias(self, task: str, alias: str, base_model: str | None = None) -> None:
        """Let an alias of a task name nothing any more.

        Raises:
            InputError: no such task or alias.
        """

        def work(session: Session) -> None:
            row = named_task(session, task, base_model)
            known = session.scalars(select(AliasRow.name).where(AliasRow.task_id == row.id)).all()
            if alias not in known:
                hint = nearest(alias, known) if known else "it has none"
                raise NotFoundError(f"task {task!r} has no alias {alias!r}; {hint}")
            session.execute(delete(AliasRow).where(AliasRow.task_id == row.id, AliasRow.name == alias))

        self._database.write(work)

    def aliases(self, entry: Entry) -> tuple[str, ...]:
        """The aliases that name an entry, sorted."""
        query = select(AliasRow.name).where(AliasRow.entry_id == entry.id).order_by(AliasRow.name)
        with self._database.reading() as session:
            return tuple(session.scalars(query))

    def aliases_of(self, task: str, base_model: str | None = None) -> Mapping[str, int]:
        """Alias -> version, of all that a task has.

        Raises:
            InputError: no such task.
        """
        with self._database.reading() as session:
            row = named_task(session, task, base_model)
            query = select(AliasRow.name, EntryRow.version).join(EntryRow, AliasRow.entry_id == EntryRow.id)
            found = session.execute(query.where(AliasRow.task_id == row.id).order_by(AliasRow.name))
            return dict(found.tuples().all())

    def set_tag(self, task: str | Entry, key: str, value: str) -> None:
        """Note a value under a key of an entry, in place of what was noted there.

        Args:
            task: an entry, or what `Registry.get` takes.

        Raises:
            InputError: no such entry, an empty key, or a key or value that is too long.
        """
        if not key.strip() or len(key) > LONGEST_NAME or len(value) > LONGEST_VALUE:
            raise InputError(
                f"tag {key[:40]!r} cannot be set; a key has 1 to {LONGEST_NAME} characters, a value at most "
                f"{LONGEST_VALUE}"
            )

        def work(session: Session) -> None:
            entry_id = task.id if isinstance(task, Entry) else named_entry(session, task, None, None).id
            row = session.get(TagRow, (entry_id, key), with_for_update=True)
            if row is None:
                session.add(TagRow(entry_id=entry_id, key=key, value=value))
            else:
                row.value = value

        self._database.write(work)

    def delete_tag(self, task: str | Entry, key: str) -> None:
        """Take a tag off an entry.

        Raises:
            InputError: no such entry or tag.
        """

        def work(session: Session) -> None:
            entry_id = task.id if isinstance(task, Entry) else named_entry(session, task, None, None).id
            known = session.scalars(select(TagRow.key).where(TagRow.entry_id == entry_id)).all()
            if key not in known:
                hint = nearest(key, known) if known else "it has none"
                raise NotFoundError(f"the entry has no tag {key!r}; {hint}")
            session.execute(delete(TagRow).where(TagRow.entry_id == entry_id, TagRow.key == key))

        self._database.write(work)

    def tags(self, entry: Entry) -> Mapping[str, str]:
        """Key -> value, of an entry's tags."""
        query = select(TagRow.key, TagRow.value).where(TagRow.entry_id == entry.id).order_by(TagRow.key)
        with self._database.reading() as session:
            return dict(session.execute(query).tuples().all())
