"""A comparison that is ended by a signal ends its cells, and no process besides."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.processes import EndedError, Processes

SLEEP = "import time; time.sleep(60)"

#: A cell that starts a process of its own, as data loading may.
CELL = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"

COMPARISON = f"""
import os, subprocess, sys, threading, time
from flows.processes import EndedError, Processes

processes, other = Processes(), subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
with open(os.devnull, "w") as out, processes.ended_by_signals():
    cell = threading.Thread(target=processes.run, args=([sys.executable, "-c", {CELL!r}], out, os.environ), daemon=True)
    cell.start()
    print(other.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_cells_and_what_they_started(number: signal.Signals) -> None:
    comparison = subprocess.Popen(
        [sys.executable, "-c", COMPARISON], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert comparison.stdout is not None
    other = psutil.Process(int(comparison.stdout.readline()))
    me, family = psutil.Process(comparison.pid), []
    while len(family) < 2:
        family = [each for each in me.children(recursive=True) if each.pid != other.pid]
    try:
        comparison.send_signal(number)
        assert comparison.wait(timeout=30) == -number
        assert psutil.wait_procs(family, timeout=30)[1] == []
        assert other.is_running()
    finally:
        for each in (*family, other):
            if each.is_running():
                each.kill()


def test_no_process_begins_after_the_end(tmp_path: Path) -> None:
    processes = Processes()
    with (tmp_path / "out").open("w") as out:
        assert processes.run([sys.executable, "-c", "raise SystemExit(3)"], out, {}) == 3
        processes.end()
        with pytest.raises(EndedError):
            processes.run([sys.executable, "-c", ""], out, {})
