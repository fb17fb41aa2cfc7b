"""A comparison's cell, in a process of its own: `python -m flows.cell CONFIG...` learns streams one after another."""

from __future__ import annotations

import os
import signal
import sys

from flows.config import load_config
from flows.environment import silence_telemetry
from flows.launch import run_stream
from flows.progress import say
from neft.errors import NeftError

#: What a line of the log begins with that says why a stream was not learnt.
FAILED = "failed: "


def main() -> int:
    """Learn each stream; what fails is said in a line of its own, and the next one is learnt."""
    silence_telemetry()
    code = 0
    for path in sys.argv[1:]:
        try:
            run_stream(load_config(path))
        except NeftError as error:
            code = error.exit_code
            say(f"{FAILED}{' '.join(str(error).split())}")
    return code


if __name__ == "__main__":
    # The comparison says that it was stopped; a report to its server, which ends too, would wait for minutes.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.exit(main())
