"""Launch: run a stream's or a comparison's flow, against the servers or the home that the config names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from filelock import FileLock, Timeout

from flows.config import StreamConfig
from flows.environment import prepare
from flows.home import Home
from flows.registries import Where, keep_password
from neft.errors import FailedError

if TYPE_CHECKING:
    from flows.compare import Outcome
    from flows.comparison import Comparison
    from flows.known import Known


def run_stream(config: StreamConfig, debug: bool = False) -> int:
    """Learn a stream, or go on with it where it stopped; returns the registry's id of the run.

    Raises:
        InputError: the config or the data are at fault.
        FailedError: a server, a file or the training failed; what is recorded stays.
    """
    home = Home.find()
    prepare(config, home, debug)
    from flows.stream import learn_stream

    keep_password(config.registry)
    with _alone(config.stream, Where.of(config.registry).locks), _without_heartbeat(), _prefect_named():
        return learn_stream(config.stream, config.model_dump(mode="json"))


def run_comparison(
    comparison: Comparison,
    jobs: int = 1,
    minutes: float | None = None,
    debug: bool = False,
    known: Known | None = None,
) -> Outcome:
    """Learn the cells of a comparison that are not learnt yet, each in a process of its own.

    Args:
        jobs: processes at once.
        minutes: begin no new cell after so many.
        known: what was learnt elsewhere, which is left out.

    Raises:
        FailedError: a server or a file failed; a cell that fails is named in what is given back.
    """
    home, config = Home.find(), comparison.config
    prepare(config, home, debug)
    from flows.compare import learn_comparison
    from flows.tuning import Ledger

    keep_password(config.registry)
    seconds = None if minutes is None else 60 * minutes
    with (
        _alone(f"compare-{comparison.name}", Where.of(config.registry).locks),
        closing(Ledger(comparison, known)) as ledger,
        _without_heartbeat(),
        _prefect_named(),
    ):
        return learn_comparison(comparison, ledger, jobs, seconds)


@contextlib.contextmanager
def _prefect_named() -> Iterator[None]:
    """
    Raises:
        FailedError: the Prefect server failed; says which.
    """
    try:
        yield
    except httpx.HTTPError as error:
        server = os.environ.get("PREFECT_API_URL", "the ephemeral server of this run")
        raise FailedError(
            f"Prefect ({server}) failed: {error or type(error).__name__}; run the same command again to go on"
        ) from error


@contextlib.contextmanager
def _alone(stream: str, folder: Path) -> Iterator[None]:
    """One run of a stream at a time; the lock is the operating system's, which frees it when its holder is killed.

    Raises:
        FailedError: another run of this stream is going on, or the folder cannot be written.
    """
    lock = FileLock(folder / f".{stream}.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise FailedError(
            f"another run of stream {stream!r} is going on in {folder}; wait for it, or end it first"
        ) from error
    except OSError as error:
        raise FailedError(f"registry folder {folder} cannot be written: {error}; choose another") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _without_heartbeat() -> Iterator[None]:
    """Each flow would wait a second at its end for its heartbeat's thread, and only a worker reads heartbeats."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
