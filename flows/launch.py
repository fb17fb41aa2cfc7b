"""Launch: run a stream's flow in this process, against the servers or the home that the config names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flows.config import StreamConfig
from flows.environment import prepare
from flows.home import Home


def run_stream(config: StreamConfig, debug: bool = False) -> int:
    """Learn a stream, or go on with it where it stopped; returns the registry's id of the run.

    Raises:
        InputError: the config or the data are at fault.
        FailedError: a server, a file or the training failed; what is recorded stays.
    """
    prepare(config, Home.find(), debug)
    from flows.stream import learn_stream

    with _without_heartbeat():
        return learn_stream(config.stream, config.model_dump(mode="json"))


@contextlib.contextmanager
def _without_heartbeat() -> Iterator[None]:
    """Each flow would wait a second at its end for its heartbeat's thread, and only a worker reads heartbeats."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
