"""The database behind a registry: SQLite or PostgreSQL, its schema, transactions, and failures in one sentence."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from neft.errors import FailedError, InputError, NeftError
from registry.artifacts import ArtifactStore
from registry.schema import Base
from registry.text import is_text, shortened

VERSION_TABLE = "neft_alembic_version"

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_SECONDS = 30
_CONNECT_SECONDS = 10
_ATTEMPTS = 20
#: Any fixed number: processes that create the schema at the same moment wait for one another on it.
_SCHEMA_LOCK = 0x6E656674

#: What two writers that meet are told: one came first (unique), or each waits for the other (PostgreSQL alone).
_SQLITE_CONFLICTS = {sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY}
_POSTGRESQL_CONFLICTS = {"23505", "40001", "40P01"}
_POSTGRESQL_LOCKED = "55P03"

_T = TypeVar("_T")


def database_url(url: str) -> URL:
    """The parsed URL of a registry's database, with psycopg 3 as PostgreSQL's driver.

    Raises:
        InputError: not a URL, or not of a SQLite file or a PostgreSQL database.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        # It is not shown: nobody can tell where a password stands in it.
        raise InputError("registry url is not a database URL; write postgresql://user@host/name") from error
    if "password" in parsed.query:  # where SQLAlchemy would show it
        parsed = parsed.set(password=str(parsed.query["password"])).difference_update_query(["password"])
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg" or (parsed.drivername == "sqlite" and parsed.database):
        return parsed
    raise InputError(
        f"registry url {parsed.render_as_string()!r} names no SQLite file and no PostgreSQL database; "
        "write sqlite:///path/to/file.db or postgresql://user@host/name"
    )


def split_password(url: str) -> tuple[str, str | None]:
    """A registry's URL without the password in it, and the password, if there is one.

    Raises:
        InputError: as `database_url` has it.
    """
    parsed = database_url(url)
    if parsed.password is None:
        return url, None
    # `set` takes None for "as it is".
    bare = URL.create(parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database, parsed.query)
    return bare.render_as_string(), parsed.password


def with_password(url: str, password: str | None) -> str:
    """A registry's URL with a password, where it has none and one is given.

    Raises:
        InputError: as `database_url` has it.
    """
    parsed = database_url(url)
    if password is None or parsed.password is not None or parsed.drivername == "sqlite":
        return url
    return parsed.set(password=password).render_as_string(hide_password=False)


class Database:
    """Transactions on one database; opening it creates the schema where there is none.

    Attributes:
        upgraded: after an upgrade, the schema's revision before (None for an empty database) and after.
    """

    upgraded: tuple[str | None, str | None]

    def __init__(self, url: URL, upgrade: ArtifactStore | None = None):
        """
        Args:
            upgrade: bring an older schema to this code's, with the files of its entries from this store; without it,
                an older schema is refused.

        Raises:
            InputError: the driver is not installed, or the database belongs to another program.
            FailedError: it cannot be reached, is corrupt, has another schema than this code, or cannot be upgraded; an
                upgrade that fails leaves it as it was.
        """
        self.name = url.database if url.drivername == "sqlite" else url.render_as_string()
        self._engine = _engine(url)
        self._writer = self._engine.execution_options(writing=True)
        self._reader = self._engine
        if self._engine.dialect.name == "postgresql":  # where each statement may see another state, unless told not to
            self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")
        try:
            if upgrade is None:
                self._prepare()
            else:
                self.upgraded = self._upgrade(upgrade)
        except BaseException:
            self.close()
            raise

    def _upgrade(self, artifacts: ArtifactStore) -> tuple[str | None, str | None]:
        with self._reported(), self._reader.connect() as connection:
            found, head = self._revisions(connection)
        if found != head:
            self._migrate(artifacts)
        return found, head

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one state of the database.

        Raises:
            InputError: text or a number that no database can keep is looked up.
            FailedError: the database fails.
        """
        with self._reported(), Session(self._reader) as session:
            yield session

    def write(self, work: Callable[[Session], _T]) -> _T:
        """Do `work` in one writing transaction; again from its start when another writer came first.

        Raises:
            InputError: text or a number that no database can keep is written or looked up.
            FailedError: the database fails; nothing of `work` is kept.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with Session(self._writer, expire_on_commit=False) as session, session.begin():
                    return work(session)
            except SQLAlchemyError as error:
                if attempt == _ATTEMPTS or not _is_conflict(error):
                    raise self._failure(error) from error
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns every failure of the database into one sentence."""
        try:
            yield
        except SQLAlchemyError as error:
            raise self._failure(error) from error

    def _failure(self, error: SQLAlchemyError) -> NeftError:
        if isinstance(error, DataError):
            return InputError(f"registry database {self.name} takes no such value ({_reason(error)}); give another")
        return FailedError(f"registry database {self.name} {_complaint(error)}")

    def _prepare(self) -> None:
        with self._reported(), self._reader.connect() as connection:
            found, head = self._revisions(connection)
        if found is None:
            self._migrate(None)
        elif found != head:
            raise FailedError(
                f"registry database {self.name} has schema {found}, older than this neft's {head}; "
                "run `neft registry upgrade`"
            )

    def _migrate(self, artifacts: ArtifactStore | None) -> None:
        with self._reported(), self._writer.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SCHEMA_LOCK})
            # Nothing is left to do where another process has done it meanwhile.
            command.upgrade(_alembic_config(connection, artifacts), "head")

    def _revisions(self, connection: Connection) -> tuple[str | None, str | None]:
        """The revision that the database has, None for an empty one, and the newest that this code knows.

        Raises:
            FailedError: the code does not know the database's revision.
            InputError: the tables are another program's.
        """
        found = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
        script = ScriptDirectory.from_config(_alembic_config(connection))
        head = script.get_current_head()
        if found is None:
            self._refuse_foreign(connection)
        elif found not in {revision.revision for revision in script.walk_revisions()}:
            raise FailedError(
                f"registry database {self.name} has schema {found}, which this neft, whose newest is {head}, does not "
                "know: a newer neft wrote it; upgrade neft"
            )
        return found, head

    def _refuse_foreign(self, connection: Connection) -> None:
        foreign = sorted(set(inspect(connection).get_table_names()) & set(Base.metadata.tables))
        if foreign:
            raise InputError(
                f"registry database {self.name} already holds another program's tables ({', '.join(foreign)}); "
                "give the registry a database of its own"
            )


def _engine(url: URL) -> Engine:
    sqlite = url.drivername == "sqlite"
    # `tcp_user_timeout`: a server that is gone without a word is noticed in the middle of a transaction, too.
    limits = {} if sqlite else {"connect_timeout": _CONNECT_SECONDS, "tcp_user_timeout": _BUSY_SECONDS * 1000}
    arguments: dict[str, Any] = {name: value for name, value in limits.items() if name not in url.query}
    try:
        engine = create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except ModuleNotFoundError as error:
        raise InputError(
            f"registry url {url.render_as_string()!r} needs the package {error.name!r}; "
            "run pip install 'psycopg[binary]'"
        ) from error
    event.listen(engine, "before_cursor_execute", _refuse_what_cannot_be_kept)
    event.listen(engine, "connect", _configure_sqlite if sqlite else _configure_postgresql)
    if sqlite:
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_postgresql(connection: Any, record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{_BUSY_SECONDS}s'")
    connection.commit()


def _refuse_what_cannot_be_kept(
    connection: Connection, cursor: object, statement: str, parameters: Any, context: object, executemany: bool
) -> None:
    """Refuses what SQLite and PostgreSQL would refuse, each in its own way, or keep and not find again."""
    # Rows that one statement inserts together come as one tuple, though they are many to SQLAlchemy.
    for row in parameters if isinstance(parameters, list) else (parameters,):
        for value in row.values() if isinstance(row, Mapping) else row:
            if isinstance(value, str) and not is_text(value):
                raise InputError(
                    f"{shortened(value)} can be neither recorded nor looked up: it holds a NUL character or half a "
                    "surrogate pair; take that out"
                )
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise InputError(f"{value} can be neither recorded nor looked up; give a number of at most 64 bits")


def _configure_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # Python's driver begins no transaction by itself; `_begin_sqlite` does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA case_sensitive_like = ON")  # as PostgreSQL's LIKE is
    _keep_log(cursor)
    cursor.close()


def _keep_log(cursor: sqlite3.Cursor) -> None:
    """Switch to a write-ahead log. Two that switch a new database at once: one is told `busy` without any waiting."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads and then writes cannot wait for another writer, so writers take the lock at the start.
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _alembic_config(connection: Connection, artifacts: ArtifactStore | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    config.attributes["artifacts"] = artifacts
    return config


_LOCKED = f"has been locked by another process for {_BUSY_SECONDS} s; try again when that one has finished"
#: What SQLite says -> what is wrong and what to do.
_SQLITE_COMPLAINTS = (
    ("locked", _LOCKED),
    ("full", "cannot grow: the disk is full; free some space and try again"),
    ("not a database", "is not a SQLite database, or is corrupt; restore it from a copy or move it away"),
    ("malformed", "is corrupt; restore it from a copy or move it away"),
    ("readonly", "cannot be written; choose a folder that can be written"),
    ("unable to open", "cannot be opened; check that its folder exists and can be written"),
)


def _is_conflict(error: SQLAlchemyError) -> bool:
    """Whether another writer was in the way, so that the same work may succeed when it is done again."""
    said: Any = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(said, sqlite3.Error):
        return getattr(said, "sqlite_errorcode", None) in _SQLITE_CONFLICTS
    return getattr(said, "sqlstate", None) in _POSTGRESQL_CONFLICTS


def _reason(error: SQLAlchemyError) -> str:
    return str(error.orig if isinstance(error, DBAPIError) else error).strip().splitlines()[0]


def _complaint(error: SQLAlchemyError) -> str:
    reason = _reason(error)
    if isinstance(error, IntegrityError):
        return f"refuses the record: {reason}"
    if getattr(getattr(error, "orig", None), "sqlstate", None) == _POSTGRESQL_LOCKED:
        return _LOCKED
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.Error):
        for said, complaint in _SQLITE_COMPLAINTS:
            if said in reason:
                return complaint
    return f"failed ({reason}); check that its disk or server is up, and try again"
