"""The database: made when it is missing, refused when it is not ours, and never left half-written."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event
from sqlalchemy.orm import Session

import registry.artifacts
import registry.database
from neft.errors import FailedError, InputError
from registry import Registry
from registry.schema import Base, BaseModelRow

FORK = multiprocessing.get_context("fork")


def change_schema(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / "registry.db")
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_the_migrations_make_the_tables_that_the_code_reads(registry):
    with registry._database._engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "neft_alembic_version", "compare_type": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_sqlite_waits_for_others_and_checks_foreign_keys(registry):
    with registry._database.reading() as session:
        for pragma, value in {"foreign_keys": 1, "journal_mode": "wal", "busy_timeout": 30_000}.items():
            assert session.connection().exec_driver_sql(f"PRAGMA {pragma}").scalar() == value


class BusyCursor:
    """Answers as SQLite does while another process switches the same new database."""

    def __init__(self, code: int, times: int):
        self.code, self.left = code, times

    def execute(self, statement: str) -> None:
        if self.left:
            self.left -= 1
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = self.code
            raise error


def test_opening_a_new_database_waits_for_another_that_does():
    cursor = BusyCursor(sqlite3.SQLITE_BUSY, times=3)
    registry.database._keep_log(cursor)
    assert cursor.left == 0
    with pytest.raises(sqlite3.OperationalError):
        registry.database._keep_log(BusyCursor(sqlite3.SQLITE_CANTOPEN, times=1))


def test_a_newer_database_is_refused(folder):
    Registry.open(folder).close()
    change_schema(folder, "UPDATE neft_alembic_version SET version_num = '9999'")
    with pytest.raises(FailedError, match=r"registry\.db has schema 9999.*newer neft wrote it"):
        Registry.open(folder)


def test_an_older_database_is_refused(folder, tmp_path, monkeypatch):
    Registry.open(folder).close()
    later = shutil.copytree(registry.database._MIGRATIONS, tmp_path / "migrations")
    (later / "versions" / "0004_later.py").write_text("revision = '0004'\ndown_revision = '0003'\n")
    monkeypatch.setattr(registry.database, "_MIGRATIONS", later)
    with pytest.raises(FailedError, match="has schema 0003, older than this neft's 0004; run `neft registry upgrade`"):
        Registry.open(folder)


def test_another_programs_database_is_refused(folder):
    folder.mkdir()
    change_schema(folder, "CREATE TABLE runs (run_uuid TEXT)")
    with pytest.raises(InputError, match=r"another program's tables \(runs\)"):
        Registry.open(folder)


def test_a_file_that_is_no_database_is_refused(folder):
    folder.mkdir()
    (folder / "registry.db").write_bytes(b"not a database at all, only text " * 100)
    with pytest.raises(FailedError, match=r"registry\.db is not a SQLite database"):
        Registry.open(folder)


def test_a_corrupt_database_is_refused(folder, base, new_pupil):
    opened = Registry.open(folder)
    new_pupil(opened, base).record("sst2")
    opened.close()
    path = folder / "registry.db"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(FailedError, match=r"registry\.db is corrupt; restore it"):
        Registry.open(folder).list()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give one"),
        ({"url": "sqlite:///a.db"}, "give one"),
        ({"url": "nonsense", "artifacts": "a"}, "'nonsense' is not a database URL"),
        ({"url": "mysql://host/name", "artifacts": "a"}, "names no SQLite file and no PostgreSQL"),
        ({"url": "sqlite://", "artifacts": "a"}, "names no SQLite file"),
    ],
)
def test_a_location_that_cannot_be_used(arguments, says):
    with pytest.raises(InputError, match=says):
        Registry.open(**arguments)


def test_a_database_by_url(tmp_path, base, new_pupil):
    opened = Registry.open(url=f"sqlite:///{tmp_path}/named.db", artifacts=tmp_path / "files")
    new_pupil(opened, base).record("sst2")
    opened.close()
    assert (tmp_path / "named.db").exists()
    assert len(list((tmp_path / "files").glob("*/*.safetensors"))) == 1


def test_a_database_that_stays_locked(registry, folder, monkeypatch):
    @event.listens_for(registry._database._engine, "connect")
    def impatient(connection, record):
        connection.execute("PRAGMA busy_timeout = 50")

    registry._database._engine.dispose()
    holder = sqlite3.connect(folder / "registry.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(FailedError, match="locked by another process"):
        registry.add_base_model("f", "name", "float32", {}, 1)
    assert registry.list() == []
    holder.close()
    registry.add_base_model("f", "name", "float32", {}, 1)


def test_a_full_disk_under_the_database(registry, pupil):
    new = replace(pupil.learn("sst2"), metrics={"curve": [0.5] * 100_000})

    def full(connection, record):
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it as: no larger than it is now

    engine = registry._database._engine
    event.listen(engine, "connect", full)
    engine.dispose()
    with pytest.raises(FailedError, match="disk is full"):
        registry.record(new)
    assert registry.list() == []
    event.remove(engine, "connect", full)
    engine.dispose()
    assert registry.record(new).version == 1


def test_a_full_disk_under_the_artifacts(registry, pupil, folder):
    new = pupil.learn("sst2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(FailedError, match="cannot write"):
            registry.record(new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert registry.list() == []
    assert [path for path in (folder / "artifacts").rglob("*") if path.is_file()] == []
    assert registry.record(new).version == 1


def base_model(fingerprint: str) -> BaseModelRow:
    return BaseModelRow(fingerprint=fingerprint, name="name", dtype="float32", config={}, parameters=1)


def test_a_writer_that_came_second_tries_again(registry):
    registry._database.write(lambda session: session.add(base_model("first")))
    names = iter(["first", "first", "second"])

    def work(session: Session) -> str:
        name = next(names)
        session.add(base_model(name))
        session.flush()
        return name

    assert registry._database.write(work) == "second"


def test_a_conflict_that_does_not_end_is_a_failure(registry):
    registry._database.write(lambda session: session.add(base_model("first")))
    with pytest.raises(FailedError, match=r"registry\.db refuses the record: UNIQUE constraint failed"):
        registry._database.write(lambda session: session.add(base_model("first")))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write under `folder`: not even root, who writes wherever it likes, and so steps down meanwhile."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    user = os.geteuid()
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name) / "registry"


def test_a_read_only_folder(public_folder, base, new_pupil):
    opened = Registry.open(public_folder)
    pupil = new_pupil(opened, base)
    first = pupil.record("sst2")
    new = pupil.learn("qnli")
    with read_only(public_folder):
        with pytest.raises(FailedError, match=r"cannot write .*choose a folder that can be written"):
            opened.record(new)
        with pytest.raises(FailedError, match="cannot be made"):
            Registry.open(public_folder / "new")
    assert opened.list() == [first]
    assert opened.record(new).version == 1
    opened.close()


def test_a_read_only_database(public_folder, base, new_pupil):
    opened = Registry.open(public_folder)
    new_pupil(opened, base).record("sst2")
    opened.close()
    refused = pytest.raises(FailedError, match=r"registry\.db cannot be (opened|written)")
    with read_only(public_folder), refused:
        Registry.open(public_folder).add_base_model("f", "name", "float32", {}, 1)


def die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_artifacts() -> None:
    registry.artifacts._sha256 = die


def killed_before_the_transaction() -> None:
    registry.database.Database.write = die


def killed_before_the_commit() -> None:
    event.listen(Session, "after_flush_postexec", die)


@pytest.mark.parametrize("arrange", [killed_in_artifacts, killed_before_the_transaction, killed_before_the_commit])
def test_killed_while_recording(folder, base, new_pupil, arrange: Callable[[], None]):
    opened = Registry.open(folder)
    new = new_pupil(opened, base).learn("sst2")
    opened.close()

    def record_and_die() -> None:
        child = Registry.open(folder)
        arrange()
        child.record(new)

    process = FORK.Process(target=record_and_die)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL

    after = Registry.open(folder)
    assert after.list() == []
    assert after.record(new).version == 1
    assert after.overlay(after.get("sst2")).parameters == new.overlay.parameters
    after.close()


def test_four_processes_record_at_once(folder, base, tmp_path, new_pupil):
    elsewhere = Registry.open(tmp_path / "elsewhere")
    pupil = new_pupil(elsewhere, base)
    new = pupil.learn("sst2")
    start = FORK.Barrier(4)

    def work(worker: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        mine = Registry.open(folder)  # four at once make the database, too
        mine.add_base_model(pupil.base, str(base), "float32", {}, 1)
        for step in range(5):
            mine.record(replace(new, input_digest=f"{worker}-{step}"))
        mine.record(replace(new, input_digest="all record this one"))
        mine.close()
        os._exit(0)  # threads that other tests started in the parent are not here, and their exit handlers would fail

    processes = [FORK.Process(target=work, args=(worker,)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(50)
    assert [process.exitcode for process in processes] == [0] * 4

    recorded = Registry.open(folder)
    assert sorted(entry.version for entry in recorded.list(task="sst2")) == list(range(1, 22))
    assert len({entry.input_digest for entry in recorded.list()}) == 21
    recorded.close()
    elsewhere.close()
