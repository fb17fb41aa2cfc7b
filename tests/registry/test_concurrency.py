"""Many writers at once, in processes of their own, on each database: nothing is lost, and nothing is half there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

import registry.database
from neft.errors import FailedError
from registry.schema import Base, BaseModelRow, EntryRow, TaskRow
from tests.registry.processes import FORK, at_once

WRITERS, EACH = 8, 3
COUNTED = ("tasks", "neuron_spaces", "neuron_sets", "aliases")


def test_eight_processes_make_one_new_database(bare_place):
    start = FORK.Barrier(WRITERS)

    def work() -> None:
        start.wait()
        with closing(bare_place.open()) as mine:
            mine.add_base_model("f", "name", "float32", {}, 1)

    at_once([work] * WRITERS)
    with closing(bare_place.open()) as made, made._database.reading() as session:
        assert session.scalar(select(func.count()).select_from(BaseModelRow)) == 1
        options = {"version_table": registry.database.VERSION_TABLE, "compare_type": True}
        assert compare_metadata(MigrationContext.configure(session.connection(), opts=options), Base.metadata) == []


def test_eight_processes_write_versions_of_one_task(place, base, new_pupil):
    with closing(place.open()) as opened:
        new = new_pupil(opened, base).learn("sst2")
    start = FORK.Barrier(WRITERS + 3)

    def write(worker: int) -> None:
        with closing(place.open()) as mine:
            start.wait()
            for step in range(EACH):
                mine.record(replace(new, input_digest=f"{worker}-{step}", metrics={"worker": worker, "step": step}))
            mine.record(replace(new, input_digest="all record this one"))

    def label(change: Callable[..., object]) -> None:
        with closing(place.open()) as mine:
            start.wait()
            while not mine.list():  # then nothing can be labelled
                pass
            for _ in range(2 * EACH):
                change(mine, mine.list()[-1].reference)

    works = [partial(write, worker) for worker in range(WRITERS)]
    works += [partial(label, lambda mine, entry: mine.set_alias(entry, "champion"))] * 2
    works += [partial(label, lambda mine, entry: mine.set_tag(entry, "stage", "prod"))]
    at_once(works)

    with closing(place.open()) as recorded:
        entries = recorded.list(task="sst2")
        assert sorted(entry.version for entry in entries) == list(range(1, WRITERS * EACH + 2))
        digests = {f"{worker}-{step}" for worker in range(WRITERS) for step in range(EACH)} | {"all record this one"}
        assert {entry.input_digest for entry in entries} == digests
        for entry in entries:
            worker_and_step = [str(entry.metrics[name]) for name in ("worker", "step") if name in entry.metrics]
            assert entry.input_digest in ("-".join(worker_and_step), "all record this one")
            assert recorded.neurons(entry) == new.neurons
        assert recorded.overlay(entries[-1]).parameters == new.overlay.parameters
        assert recorded.get("sst2@champion") in entries
        with place.sql() as connection:
            counted = {table: connection.scalar(text(f"SELECT count(*) FROM {table}")) for table in COUNTED}
        assert counted == {"tasks": 1, "neuron_spaces": 1, "neuron_sets": len(entries), "aliases": 1}


def test_one_alias_and_one_tag_set_by_many_at_once(place, base, new_pupil):
    with closing(place.open()) as opened:
        pupil = new_pupil(opened, base)
        entries = [pupil.record("sst2") for _ in range(3)]
    rounds, workers = 5, 8
    start = FORK.Barrier(workers)

    def work(worker: int) -> None:
        with closing(place.open()) as mine:
            for turn in range(rounds):
                start.wait()  # every round is a new alias and a new tag, which all of them try to insert
                mine.set_alias("sst2", f"alias{turn}", version=worker % 3 + 1)
                start.wait()
                mine.set_tag(entries[0], f"tag{turn}", str(worker))

    at_once([partial(work, worker) for worker in range(workers)])
    with closing(place.open()) as recorded:
        named = recorded.aliases_of("sst2")
        assert list(named) == [f"alias{turn}" for turn in range(rounds)]
        assert set(named.values()) <= {1, 2, 3}
        assert list(recorded.tags(entries[0])) == [f"tag{turn}" for turn in range(rounds)]


def test_a_reading_sees_one_state(anywhere, student, place):
    student.record("sst2")
    count = select(func.count()).select_from(EntryRow)
    with closing(place.open()) as reader, reader._database.reading() as session:
        assert session.scalar(count) == 1
        student.record("qnli")
        assert session.scalar(count) == 1
    assert len(anywhere.list()) == 2


def test_a_database_that_stays_locked(place, monkeypatch):
    monkeypatch.setattr(registry.database, "_BUSY_SECONDS", 1)
    lock = {"sqlite": ("BEGIN IMMEDIATE",), "postgresql": ("BEGIN", "LOCK TABLE base_models IN EXCLUSIVE MODE")}
    with closing(place.open()) as opened:
        with place.sql() as holder:
            for statement in lock[place.kind]:
                holder.exec_driver_sql(statement)
            with pytest.raises(FailedError, match=r"has been locked by another process for .*; try again"):
                opened.add_base_model("f", "name", "float32", {}, 1)
            assert opened.list() == []
            holder.exec_driver_sql("ROLLBACK")
        opened.add_base_model("f", "name", "float32", {}, 1)


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_writers_that_wait_for_each_other_both_succeed(anywhere, student):
    entries = [student.record(task) for task in ("sst2", "qnli")]
    both, tries = threading.Barrier(2), []

    def lock_both(session: Session, names: list[str]) -> None:
        tries.append(names[0])
        for number, name in enumerate(names):
            session.scalars(select(TaskRow).where(TaskRow.name == name).with_for_update(of=TaskRow)).one()
            if number == 0 and len(tries) <= 2:
                both.wait(20)

    works = [partial(lock_both, names=names) for names in (["sst2", "qnli"], ["qnli", "sst2"])]
    threads = [threading.Thread(target=anywhere._database.write, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(tries[:2]) == ["qnli", "sst2"]
    assert len(tries) == 3  # PostgreSQL ended one of them, which began again
    assert anywhere.list() == entries


def base_model(fingerprint: str) -> BaseModelRow:
    return BaseModelRow(fingerprint=fingerprint, name="name", dtype="float32", config={}, parameters=1)


def test_a_writer_that_came_second_tries_again(anywhere):
    anywhere._database.write(lambda session: session.add(base_model("first")))
    names = iter(["first", "first", "second"])

    def work(session: Session) -> str:
        name = next(names)
        session.add(base_model(name))
        session.flush()
        return name

    assert anywhere._database.write(work) == "second"


def test_a_conflict_that_does_not_end_is_a_failure(anywhere):
    anywhere._database.write(lambda session: session.add(base_model("first")))
    with pytest.raises(FailedError, match=r"refuses the record: .*(UNIQUE constraint failed|duplicate key)"):
        anywhere._database.write(lambda session: session.add(base_model("first")))
