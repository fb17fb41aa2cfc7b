"""Look-ups on a session: an entry by its inputs or its name, a chain, an evaluation, the runs of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from neft.errors import InputError, nearest
from registry.schema import BaseModelRow, EntryRow, EvaluationRow, RunRow, TaskRow


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


def parent_row(session: Session, parent_id: int, base: BaseModelRow) -> EntryRow:
    """The entry to build on.

    Raises:
        InputError: there is none, or it is of another base model.
    """
    parent = session.get(EntryRow, parent_id)
    if parent is None:
        raise InputError(f"parent entry {parent_id} is not in the registry; record it first")
    if parent.task.base_model_id != base.id:
        raise InputError(
            f"parent {parent.task.name}@{parent.version} is of base model {parent.task.base_model.fingerprint[:12]}, "
            f"not {base.fingerprint[:12]}; a chain keeps to one base model"
        )
    return parent


def _split_reference(reference: str, version: int | None) -> tuple[str, int | None]:
    """Task and version of `task`, or of `task@3`.

    Raises:
        InputError: what follows the `@` is no version, or not the `version` that was given beside it.
    """
    task, at, written = reference.partition("@")
    if not at:
        return task, version
    if not written.isdecimal():
        raise InputError(f"{reference!r} has no version after '@'; write {task}@3, or {task} for the newest")
    if version not in (None, int(written)):
        raise InputError(f"{reference!r} and version {version} disagree; give one of them")
    return task, int(written)


def named_entry(session: Session, reference: str, version: int | None, base_model: str | None) -> EntryRow:
    """The entry of a task, the newest unless a version is asked for.

    Raises:
        InputError: no such task or version, or a task of several base models when none is named.
    """
    name, version = _split_reference(reference, version)
    task = _task(session, name, base_model)
    query = select(EntryRow).where(EntryRow.task_id == task.id).order_by(EntryRow.version.desc()).limit(1)
    newest = session.scalars(query).one()
    if version in (None, newest.version):
        return newest
    row = session.scalars(
        select(EntryRow).where(EntryRow.task_id == task.id, EntryRow.version == version)
    ).one_or_none()
    if row is None:
        raise InputError(f"task {name!r} has no version {version}; its versions are 1 to {newest.version}")
    return row


def _task(session: Session, name: str, base_model: str | None) -> TaskRow:
    tasks = session.scalars(select(TaskRow).where(TaskRow.name == name).order_by(TaskRow.id)).all()
    if not tasks:
        known = session.scalars(select(TaskRow.name).distinct()).all()
        hint = nearest(name, known) if known else "nothing has been recorded yet"
        raise InputError(f"no task {name!r} in the registry; {hint}")
    chosen = [task for task in tasks if base_model is None or _is_base(task, base_model)]
    if len(chosen) == 1:
        return chosen[0]
    bases = ", ".join(f"{task.base_model.fingerprint[:12]} ({task.base_model.name})" for task in tasks)
    if chosen:
        raise InputError(f"task {name!r} was learnt on several base models; name one by its fingerprint: {bases}")
    raise InputError(f"task {name!r} was not learnt on base model {base_model!r}; it was on {bases}")


def _is_base(task: TaskRow, base_model: str) -> bool:
    """Whether `base_model` names the task's base model: its name, or how its fingerprint begins."""
    return task.base_model.name == base_model or task.base_model.fingerprint.startswith(base_model)


def chain_rows(session: Session, entry_id: int) -> Sequence[EntryRow]:
    """The entry and all it was built on, root first."""
    rows = []
    row: EntryRow | None = session.get_one(EntryRow, entry_id)
    while row is not None:
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
