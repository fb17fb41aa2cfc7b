"""What the commands of `neft registry` share: their group, their options, the open registry, and how they print."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from flows.registries import Where

if TYPE_CHECKING:
    from registry import Registry

registry_app = typer.Typer(no_args_is_help=True, help="Look up, reuse, share and undo what has been learnt.")

#: A file or a pipe has no width, and a table should not be cut for it.
OUT = Console(width=None if sys.stdout.isatty() else 160)

_debug = False


def _set_debug(value: bool) -> None:
    global _debug  # noqa: PLW0603 - read once, by `flows.cli.main`, after the command has failed
    _debug = _debug or value


def debugging() -> bool:
    """Whether --debug was given."""
    return _debug


Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.", callback=_set_debug)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BaseModel = Annotated[
    str | None, typer.Option(help="Name or fingerprint of the base model, if the task was learnt on several.")
]
Location = Annotated[
    Path | None,
    typer.Option(
        "--registry", help="Folder of the registry; default: what NEFT_REGISTRY_URL names, or the one in neft's home."
    ),
]
EntryName = Annotated[
    str,
    typer.Argument(metavar="ENTRY", help="A task, or a version of it: TASK, TASK@2, TASK@ALIAS.", show_default=False),
]


def open_registry(location: Path | None) -> closing[Registry]:
    """The registry of a command, closed at its end.

    Raises:
        InputError: there is none.
    """
    where = Where.found(location)
    where.check_there()
    return closing(where.open())


def cells(*values: object) -> list[Text]:
    """A table's cells: what somebody has named is no markup, and gives the terminal no commands."""
    written = (str(value) for value in values)
    return [Text("".join(each if each.isprintable() or each == "\n" else "?" for each in one)) for one in written]


def print_json(value: Any) -> None:
    """Print what a script reads."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
