"""The ways neft refuses: the input is wrong, or the work failed, or its records."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NeftError(Exception):
    """One clear sentence: what is wrong, its value, and what to do. The command line prints it without a traceback."""

    exit_code = 1


class InputError(NeftError, ValueError):
    """The user's input is at fault: a config, a file, a name, an option. Pydantic reports it as a ValueError."""

    exit_code = 2


class NotFoundError(InputError):
    """What was named does not exist: a task, a version, an alias, a stream, a site."""


class FailedError(NeftError):
    """The input was accepted, but the work could not be done: a corrupt artefact, a failed audit, a server gone."""

    exit_code = 1


class RecordError(FailedError):
    """What is recorded or shown could not be read or written: no fault of a task, so that a stream cannot go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest known one, or all of them when none is near."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
