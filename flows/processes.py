"""The processes of a comparison's cells while they run; they end when the comparison is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO


class EndedError(Exception):
    """The comparison was ended, and no process begins."""


class Processes:
    """Processes that run, each the head of a process group of its own."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, command: Sequence[str], out: IO[str], environment: Mapping[str, str]) -> int:
        """Run a command to its end; its exit code.

        Raises:
            EndedError: all processes were ended.
        """
        # Within the lock, so that none is begun that `end` does not know.
        with self._lock:
            if self._ended:
                raise EndedError
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def end(self) -> None:
        """End every process with all that it started, and begin no other."""
        with self._lock:
            self._ended = True
            for process in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """While this lasts, SIGINT and SIGTERM end the processes, and then do what they did before.

        Meant for the main thread. SIGTERM ends this process at once, as it does by default: what stands between, such
        as Prefect's own handler, would wait for the processes and report to a server.
        """

        def interrupt(number: int, frame: object) -> None:
            self.end()
            signal.signal(signal.SIGINT, before)
            os.kill(os.getpid(), signal.SIGINT)

        def terminate(number: int, frame: object) -> None:
            self.end()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGINT, interrupt)
        after = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            signal.signal(signal.SIGTERM, after)
