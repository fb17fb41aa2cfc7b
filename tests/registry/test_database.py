"""The database: made when it is missing, and refused when it is not one."""

from __future__ import annotations

import sqlite3

import pytest

import registry.database
from neft.errors import FailedError, InputError
from registry import Registry


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
        ({"url": "nonsense", "artifacts": "a"}, "registry url is not a database URL"),
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
