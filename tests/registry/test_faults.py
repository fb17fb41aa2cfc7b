"""A full disk, a store that cannot be written, a database that goes away: one clear sentence, and a retry works."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from neft.errors import FailedError
from registry import NewEntry, Registry
from tests.registry.conftest import Place, new_place
from tests.registry.postgres import connected, end_others, need_postgres


@contextmanager
def one_sentence(match: str) -> Iterator[None]:
    """The work within fails, and says so on one line."""
    with pytest.raises(FailedError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def check_unchanged(opened: Registry, place: Place, new: NewEntry) -> None:
    """Nothing of the entry is recorded, and it can be recorded now."""
    assert opened.find(new.input_digest) is None
    with place.sql() as connection:
        entries, sets = (connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in ("entries", "neuron_sets"))
    assert entries == sets == len(opened.list())
    entry = opened.record(new)
    assert opened.neurons(entry) == new.neurons
    assert opened.overlay(entry).parameters == new.overlay.parameters


# A full disk


def test_a_full_disk_under_the_artifacts(anywhere, student, place):
    new = student.learn("sst2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with one_sentence(r"cannot write .*overlay\.safetensors: .*File too large.*; free some space"):
            anywhere.record(new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in place.artifacts.rglob("*") if path.is_file()] == []
    check_unchanged(anywhere, place, new)


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_full_disk_under_the_database(anywhere, student, place):
    new = replace(student.learn("sst2"), metrics={"curve": [0.5] * 100_000})

    def full(connection, record):
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it as: no larger than it is now

    engine = anywhere._database._engine
    event.listen(engine, "connect", full)
    engine.dispose()
    with one_sentence("disk is full"):
        anywhere.record(new)
    event.remove(engine, "connect", full)
    engine.dispose()
    check_unchanged(anywhere, place, new)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 2 MiB."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder]
        if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("NO SMALL DISK: a file system that can be filled takes root, who may mount one")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_that_fills_up(small_disk, base, new_pupil):
    with new_place("sqlite", small_disk / "registry") as place, closing(place.open()) as opened:
        pupil = new_pupil(opened, base)
        failures = set()
        for kilobytes in (0, 8, 16, 24, 32, 48, 64, 96):
            new = replace(pupil.learn("sst2"), metrics={"curve": [0.5] * 5_000})
            with (small_disk / "filler").open("wb") as filler:
                filler.write(bytes(os.statvfs(small_disk).f_bavail * 4096 - 1024 * kilobytes))
            try:
                opened.record(new)
            except FailedError as error:
                failures.add(re.sub(r" to .*?: | database \S+ ", " ", str(error))[:40])
                (small_disk / "filler").unlink()
                check_unchanged(opened, place, new)
        assert len(failures) > 1, failures  # the disk was full under the artifacts, and under the database
        assert [entry.version for entry in opened.list()] == list(range(1, 9))


# A store or a database that may only be read


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


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_read_only_store(kind, public_folder, base, new_pupil):
    with new_place(kind, public_folder) as place, closing(place.open()) as opened:
        pupil = new_pupil(opened, base)
        first = pupil.record("sst2")
        new = pupil.learn("qnli")
        with read_only(public_folder):
            with one_sentence(r"cannot write .*choose a folder that can be written"):
                opened.record(new)
            with one_sentence("cannot be made"):
                Registry.open(public_folder / "new")
        assert opened.list() == [first]
        check_unchanged(opened, place, new)


def test_a_read_only_database(public_folder, base, new_pupil):
    with closing(Registry.open(public_folder)) as opened:
        new_pupil(opened, base).record("sst2")
    with read_only(public_folder), one_sentence(r"registry\.db cannot be (opened|written)"):
        Registry.open(public_folder).add_base_model("f", "name", "float32", {}, 1)


def test_a_file_where_the_store_should_be(anywhere, student, place):
    new = student.learn("sst2")
    place.artifacts.parent.mkdir(exist_ok=True)
    place.artifacts.write_text("a file")
    with one_sentence("cannot write the overlay to .*File exists"):
        anywhere.record(new)
    place.artifacts.unlink()
    check_unchanged(anywhere, place, new)


# A PostgreSQL that goes away

postgresql = pytest.mark.parametrize("place", ["postgresql"], indirect=True)


def end_connections(place: Place) -> int:
    """What a restart of the server does to those who are connected to it."""
    with connected(place.url.database) as connection:
        return end_others(connection)


def statements_of(opened: Registry, new: NewEntry) -> int:
    """How many statements it takes to record."""
    found = []
    engine = opened._database._engine
    listener = lambda *_: found.append(1)  # noqa: E731 - so that it can be removed
    event.listen(engine, "before_cursor_execute", listener)
    opened.record(new)
    event.remove(engine, "before_cursor_execute", listener)
    return len(found)


@postgresql
def test_a_connection_that_is_lost_at_any_statement(anywhere, student, place):
    student.record("first")
    count = statements_of(anywhere, student.learn("second"))
    assert count >= 8
    engine = anywhere._database._engine
    for number in range(1, count + 1):
        new = student.learn(f"task{number}")
        left = iter(range(number - 1, -1, -1))

        def end(*arguments: object, left: Iterator[int] = left) -> None:
            if next(left, None) == 0:
                assert end_connections(place) == 1

        event.listen(engine, "before_cursor_execute", end)
        with one_sentence(r"registry database .* failed \(.*\); check that its disk or server is up, and try again"):
            anywhere.record(new)
        event.remove(engine, "before_cursor_execute", end)
        check_unchanged(anywhere, place, new)


@postgresql
@pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
def test_a_connection_that_is_lost_at_the_commit(anywhere, student, place, moment):
    new = student.learn("sst2")

    def end(session: Session) -> None:
        end_connections(place)

    event.listen(Session, moment, end)
    try:
        if moment == "before_commit":
            with one_sentence("try again"):
                anywhere.record(new)
        else:
            anywhere.record(new)
    finally:
        event.remove(Session, moment, end)
    assert [entry.version for entry in anywhere.list()] == ([] if moment == "before_commit" else [1])
    assert anywhere.record(new).version == 1


@postgresql
@pytest.mark.parametrize(
    "call",
    [
        lambda opened, pupil: opened.list(),
        lambda opened, pupil: opened.get("sst2@champion"),
        lambda opened, pupil: pupil.record("qnli"),
        lambda opened, pupil: opened.set_alias("sst2", "newest"),
        lambda opened, pupil: opened.set_tag("sst2", "stage", "prod"),
        lambda opened, pupil: opened.streams(),
    ],
)
def test_a_server_that_was_restarted_between_two_calls(anywhere, student, place, call: Callable[..., object]):
    student.record("sst2")
    anywhere.set_alias("sst2", "champion")
    assert end_connections(place) >= 1
    call(anywhere, student)


def test_a_server_that_is_not_there(tmp_path):
    start = time.monotonic()
    with one_sentence(r"registry database postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/name failed \(.*refused"):
        Registry.open(url="postgresql://me:secret@127.0.0.1:1/name", artifacts=tmp_path)
    assert time.monotonic() - start < 10


def test_a_database_that_is_not_there(tmp_path):
    need_postgres()
    with connected() as connection:
        url = connection.engine.url.set(database="neft_none", drivername="postgresql")
    with one_sentence("neft_none.*does not exist"):
        Registry.open(url=url.render_as_string(hide_password=False), artifacts=tmp_path)


@postgresql
def test_moments_are_in_utc_whatever_the_servers_time_zone(place, base, new_pupil):
    with connected(place.url.database) as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {place.url.database} SET timezone = 'Asia/Kolkata'")
    with closing(place.open()) as opened:
        before = time.time()
        entry = new_pupil(opened, base).record("sst2")
        assert opened.get("sst2").created_at == entry.created_at
        assert opened.get("sst2").created_at.utcoffset().total_seconds() == 0
        assert before <= entry.created_at.timestamp() <= time.time()
    with connected(place.url.database) as connection:
        connection.exec_driver_sql(f"ALTER DATABASE {place.url.database} RESET timezone")
