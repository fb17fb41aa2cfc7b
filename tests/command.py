"""The command line, run in the process of a test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows import cli, registry_options


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code, and what it wrote to standard output and standard error."""

    code: int
    out: str
    err: str


Neft = Callable[..., Outcome]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Neft:
    """A function that runs `neft ARGUMENTS` in this process."""

    def call(*arguments: str | float | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["neft", *map(str, arguments)])
        monkeypatch.setattr(registry_options, "_debug", False)
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
