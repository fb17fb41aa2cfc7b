"""Progress, said to the person who watches: one line a step, on standard error; bars are the libraries' own."""

from __future__ import annotations

from rich.console import Console

_CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """Print one line, as it is."""
    _CONSOLE.print(line, markup=False)
