"""Work in processes of its own, at once, or killed in its midst."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence

import torch

FORK = multiprocessing.get_context("fork")


def _alone(work: Callable[[], None]) -> None:
    torch.set_num_threads(1)  # threads of the parent's are not here to take part
    code = 1
    try:
        work()
        code = 0
    except Exception:  # noqa: BLE001 - the parent, which cannot see it, is told by the exit code
        traceback.print_exc()
    finally:
        os._exit(code)  # without exit handlers, for those of other tests' threads would fail


def at_once(works: Sequence[Callable[[], None]], seconds: float = 60) -> None:
    """Do each piece of work in a process of its own; all must end well."""
    processes = [FORK.Process(target=_alone, args=(work,)) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    left = [process for process in processes if process.is_alive()]
    for process in left:
        process.kill()
    assert not left, f"{len(left)} of {len(works)} processes had not ended after {seconds} s"
    assert [process.exitcode for process in processes] == [0] * len(works)


def is_killed(work: Callable[[], None], seconds: float = 30) -> bool:
    """Do the work in a process of its own: whether `die` killed it; otherwise it must have ended well."""
    process = FORK.Process(target=_alone, args=(work,))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == -signal.SIGKILL


def die(*arguments: object, **named: object) -> None:
    """Kill this process, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
