"""Look-ups on a session: an entry by its inputs or its name, a chain, an evaluation, the runs of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Select, bindparam, func, select
from sqlalchemy.orm import Session, aliased, contains_eager

from neft.errors import FailedError, InputError, NotFoundError, nearest
from registry.records import Entry
from registry.schema import AliasRow, BaseModelRow, EntryRow, EvaluationRow, RunRow, TaskRow
from registry.text import shortened

#: What the databases can compare a version with.
LARGEST_VERSION = 2**31 - 1
#: What a version is written with at most, since Python reads no number of thousands of digits.
_MOST_DIGITS = 100


def base_model_row(session: Session, fingerprint: str) -> BaseModelRow | None:
    """The base model of that fingerprint."""
    return session.scalars(select(BaseModelRow).where(BaseModelRow.fingerprint == fingerprint)).one_or_none()


def entry_of_input(session: Session, input_digest: str) -> EntryRow | None:
    """The entry that was made from these inputs."""
    return session.scalars(select(EntryRow).where(EntryRow.input_digest == input_digest)).one_or_none()


def evaluation_row(session: Session, state_digest: str, data_digest: str) -> EvaluationRow | None:
    """The evaluation of that state on that data."""
    query = select(EvaluationRow).where(
        EvaluationRow.state_digest == state_digest, EvaluationRow.data_digest == data_digest
    )
    return session.scalars(query).one_or_none()


def locked_task(session: Session, name: str, base: BaseModelRow) -> TaskRow:
    """The task, made if it is new; other writers of it wait (PostgreSQL by the row, SQLite by the whole database)."""
    query = select(TaskRow).where(TaskRow.name == name, TaskRow.base_model_id == base.id).with_for_update(of=TaskRow)
    task = session.scalars(query).one_or_none()
    if task is None:
        task = TaskRow(name=name, base_model=base)
        session.add(task)
        session.flush()
    return task


def linked_id(session: Session, link: str, entry: Entry | int | None, base: BaseModelRow) -> int | None:
    """The id of an entry that a new one names as its `parent`, or in another link; None for none.

    Raises:
        InputError: there is no such entry, or it is of another base model.
    """
    if entry is None:
        return None
    entry_id = entry if isinstance(entry, int) else entry.id
    row = session.get(EntryRow, entry_id)
    what = link.replace("_", " ")
    if row is None:
        raise InputError(f"{what} entry {entry_id} is not in the registry; record it first")
    if row.task.base_model_id != base.id:
        raise InputError(
            f"{what} {row.task.name}@{row.version} is of base model {row.task.base_model.fingerprint[:12]}, "
            f"not {base.fingerprint[:12]}; a chain keeps to one base model"
        )
    return row.id


def split_reference(reference: str, version: int | None) -> tuple[str, int | str | None]:
    """Task and version of `task` or `task@3`, or task and alias of `task@champion`.

    Raises:
        InputError: nothing follows the `@`, a number that is no version, or not the `version` that was given beside it.
    """
    task, at, written = reference.partition("@")
    if not at:
        return task, version
    if not written:
        raise InputError(
            f"{shortened(reference)} has nothing after '@'; write a version or an alias there, or the task alone for "
            "the newest"
        )
    if written.isdecimal() and len(written) > _MOST_DIGITS:
        raise NotFoundError(f"no task has as many versions as {shortened(reference)} says; give a smaller number")
    found = int(written) if written.isdecimal() else written
    if version not in (None, found):
        raise InputError(f"{reference!r} and version {version} disagree; give one of them")
    return task, found


def named_entry(session: Session, reference: str, version: int | None, base_model: str | None) -> EntryRow:
    """The entry of a task, the newest unless a version or an alias is asked for.

    Raises:
        InputError: no such task, version or alias, or a task of several base models when none is named.
    """
    name, wanted = split_reference(reference, version)
    found = _only_entry(session, name, wanted, base_model)
    return found or _entry_of_several(session, name, wanted, base_model)


def _only_entry(session: Session, name: str, wanted: int | str | None, base_model: str | None) -> EntryRow | None:
    """The entry, by one quick query, where there is one and one task of that name."""
    if isinstance(wanted, int) and wanted > LARGEST_VERSION:
        return None
    parameters = {"task": name} if wanted is None else {"task": name, "wanted": wanted}
    row = session.execute(_ONLY[type(wanted)], parameters).first()
    if row is None or row[1] != 1:
        return None
    entry: EntryRow = row[0]
    return entry if base_model is None or is_base(entry.task.base_model, base_model) else None


def _only() -> Mapping[type, Select[tuple[EntryRow, int]]]:
    """The query of `_only_entry`, of a task's newest version, a version and an alias.

    Made once: SQLAlchemy takes longer to make a query than a database to answer it.
    """
    same = aliased(TaskRow)
    tasks = select(func.count(same.id)).where(same.name == bindparam("task")).scalar_subquery()
    query = select(EntryRow, tasks).join(EntryRow.task).options(contains_eager(EntryRow.task))
    query = query.where(TaskRow.name == bindparam("task"))
    newest = query.order_by(EntryRow.version.desc()).limit(1)
    by_alias = newest.join(AliasRow, AliasRow.entry_id == EntryRow.id).where(AliasRow.name == bindparam("wanted"))
    return {type(None): newest, int: newest.where(EntryRow.version == bindparam("wanted")), str: by_alias}


_ONLY = _only()


def _entry_of_several(session: Session, name: str, wanted: int | str | None, base_model: str | None) -> EntryRow:
    """The entry where the base model decides, or what is wrong with the reference."""
    task = named_task(session, name, base_model)
    if isinstance(wanted, str):
        return _aliased_entry(session, task, wanted)
    query = select(EntryRow).where(EntryRow.task_id == task.id)
    if wanted is None:
        return session.scalars(query.order_by(EntryRow.version.desc()).limit(1)).one()
    row = session.scalars(query.where(EntryRow.version == wanted)).one_or_none() if wanted <= LARGEST_VERSION else None
    if row is None:
        newest = session.scalar(select(func.max(EntryRow.version)).where(EntryRow.task_id == task.id))
        raise NotFoundError(f"task {name!r} has no version {wanted}; its versions are 1 to {newest}")
    return row


def _aliased_entry(session: Session, task: TaskRow, alias: str) -> EntryRow:
    query = select(EntryRow).join(AliasRow, AliasRow.entry_id == EntryRow.id)
    row = session.scalars(query.where(AliasRow.task_id == task.id, AliasRow.name == alias)).one_or_none()
    if row is None:
        known = session.scalars(select(AliasRow.name).where(AliasRow.task_id == task.id)).all()
        hint = nearest(alias, known) if known else "it has none; set one with `neft registry alias`"
        raise NotFoundError(f"task {task.name!r} has no alias {shortened(alias)}; {hint}")
    return row


def named_task(session: Session, name: str, base_model: str | None) -> TaskRow:
    """The task of that name.

    Raises:
        InputError: there is none, or it was learnt on several base models and none is named.
    """
    tasks = session.scalars(select(TaskRow).where(TaskRow.name == name).order_by(TaskRow.id)).all()
    if not tasks:
        known = session.scalars(select(TaskRow.name).distinct()).all()
        hint = nearest(name, known) if known else "nothing has been recorded yet"
        raise NotFoundError(f"no task {shortened(name)} in the registry; {hint}")
    chosen = [task for task in tasks if base_model is None or is_base(task.base_model, base_model)]
    if len(chosen) == 1:
        return chosen[0]
    bases = ", ".join(f"{task.base_model.fingerprint[:12]} ({task.base_model.name})" for task in tasks)
    if chosen:
        raise InputError(f"task {name!r} was learnt on several base models; name one by its fingerprint: {bases}")
    raise NotFoundError(f"task {name!r} was not learnt on base model {base_model!r}; it was on {bases}")


def is_base(row: BaseModelRow, base_model: str) -> bool:
    """Whether `base_model` names that base model: its name, or how its fingerprint begins."""
    return row.name == base_model or row.fingerprint.startswith(base_model)


def chain_rows(session: Session, entry_id: int) -> Sequence[EntryRow]:
    """The entry and all it was built on, root first."""
    rows: list[EntryRow] = []
    row: EntryRow | None = session.get_one(EntryRow, entry_id)
    while row is not None:
        if row in rows:
            raise FailedError(f"the chain of entry {entry_id} comes back to entry {row.id}; restore the database")
        rows.append(row)
        row = session.get(EntryRow, row.parent_id) if row.parent_id is not None else None
    return rows[::-1]


def newest_run_row(
    session: Session, stream: str, config_digest: str | None = None, status: str | None = None
) -> RunRow | None:
    """The newest run of a stream, of one config and status where they are given."""
    query = select(RunRow).where(RunRow.stream == stream).order_by(RunRow.id.desc()).limit(1)
    if config_digest is not None:
        query = query.where(RunRow.config_digest == config_digest)
    if status is not None:
        query = query.where(RunRow.status == status)
    return session.scalars(query).one_or_none()


def run_rows(session: Session, stream: str) -> Sequence[RunRow]:
    """Every run of a stream, in the order they were started."""
    return session.scalars(select(RunRow).where(RunRow.stream == stream).order_by(RunRow.id)).all()


def stream_names(session: Session) -> Sequence[str]:
    """Every stream that has been run, sorted."""
    return session.scalars(select(RunRow.stream).distinct().order_by(RunRow.stream)).all()
