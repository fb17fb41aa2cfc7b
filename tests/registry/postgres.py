"""A real PostgreSQL for tests: `NEFT_TEST_POSTGRES`, or the server on 127.0.0.1:5432."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError


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
def new_database() -> Iterator[str]:
    """URL of an empty database, dropped afterwards."""
    need_postgres()
    name = f"neft_test_{uuid.uuid4().hex[:12]}"
    engine = create_engine(server(), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield make_url(server()).set(database=name, drivername="postgresql").render_as_string(hide_password=False)
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        engine.dispose()
