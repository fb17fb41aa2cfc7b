"""A real PostgreSQL for tests: `NEFT_TEST_POSTGRES`, or the server on 127.0.0.1:5432.

To make a database and to drop it takes a second, so they are kept until the tests end, and emptied between tests.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import cache

import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from registry import Registry
from registry.schema import Base

_PREFIX = "neft_test_"
#: Databases that this process has made, and those of them that no test has now.
_made: list[str] = []
_free: list[str] = []


def server() -> str:
    """URL of a database whose user may make others."""
    url = os.environ.get("NEFT_TEST_POSTGRES") or "postgresql://postgres@127.0.0.1:5432/postgres"
    return make_url(url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


@cache
def _complaint() -> str | None:
    engine = create_engine(server(), connect_args={"connect_timeout": 5})
    try:
        with engine.connect():
            return None
    except OperationalError as error:
        return str(error.orig).strip().splitlines()[0]
    finally:
        engine.dispose()


def need_postgres() -> None:
    """Skip, loudly, where there is no server; where `NEFT_REQUIRE_POSTGRES` is set, as in CI, fail."""
    reason = _complaint()
    if reason is None:
        return
    said = f"NO POSTGRESQL at {server()}: {reason}; start one or set NEFT_TEST_POSTGRES"
    if os.environ.get("NEFT_REQUIRE_POSTGRES"):
        pytest.fail(said)
    pytest.skip(said)


@contextmanager
def connected(name: str | None = None) -> Iterator[Connection]:
    """A connection apart from any registry's, each statement a transaction; to the server's own database by default."""
    url = make_url(server())
    engine = create_engine(url if name is None else url.set(database=name), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def url_of(name: str) -> str:
    """What `Registry.open` takes for a database."""
    return make_url(server()).set(database=name, drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def new_database(schema: bool = True) -> Iterator[str]:
    """URL of a database that holds nothing.

    Args:
        schema: it has the newest schema already; without, it has no table at all.
    """
    need_postgres()
    name = _free.pop() if _free else _make()
    with connected(name) as connection:
        end_others(connection)
        ready = connection.scalar(text("SELECT to_regclass('neft_alembic_version')")) is not None
        if schema and ready:
            _empty(connection)
        elif ready:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    if schema and not ready:
        with tempfile.TemporaryDirectory() as folder:
            Registry.open(url=url_of(name), artifacts=folder).close()
    try:
        yield url_of(name)
    finally:
        _free.append(name)


def end_others(connection: Connection) -> int:
    """End all other connections to this database; how many there were."""
    others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return len(connection.execute(text(f"SELECT pg_terminate_backend(pid, 5000) {others}")).all())


def drop_databases() -> None:
    """Drop what this process has made."""
    if _made:
        with connected() as connection:
            for name in _made:
                connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


def _make() -> str:
    today = datetime.now(UTC).date()
    name = f"{_PREFIX}{today:%Y%m%d}_{uuid.uuid4().hex[:8]}"
    with connected() as connection:
        if not _made:
            _drop_leftovers(connection, today)
        connection.execute(text(f"CREATE DATABASE {name}"))
        connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))  # no test cuts the power
    _made.append(name)
    return name


def _drop_leftovers(connection: Connection, today: date) -> None:
    """Drop the databases of test runs that were killed before yesterday."""
    for name in connection.scalars(text("SELECT datname FROM pg_database")).all():
        made_on = name.removeprefix(_PREFIX)[:8]
        if name.startswith(_PREFIX) and made_on < f"{today - timedelta(days=1):%Y%m%d}":
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


def _empty(connection: Connection) -> None:
    """Take everything out, past the triggers that refuse it; ids begin at 1 again."""
    tables = [table.name for table in reversed(Base.metadata.sorted_tables)]
    guarded = connection.scalars(text("SELECT DISTINCT tgrelid::regclass::text FROM pg_trigger WHERE NOT tgisinternal"))
    guarded = guarded.all()
    for statement in (
        "BEGIN",
        *(f"ALTER TABLE {table} DISABLE TRIGGER USER" for table in guarded),
        *(f"DELETE FROM {table}" for table in tables),
        *(f"ALTER TABLE {table} ENABLE TRIGGER USER" for table in guarded),
        "SELECT setval(format('%I', sequencename), 1, false) FROM pg_sequences".replace("%", "%%"),
        "COMMIT",
    ):
        connection.exec_driver_sql(statement)
