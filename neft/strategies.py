"""Strategies found by name: a scorer, policy or baseline built from the words of a config."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from neft.errors import InputError, nearest

Strategy = TypeVar("Strategy")

#: A strategy in a config: its name, or a mapping of `name` and its options.
Choice = str | dict[str, Any]


def build(role: str, known: Mapping[str, type[Strategy]], choice: Choice) -> Strategy:
    """Make the strategy that `choice` names; each strategy is a dataclass whose fields are its options.

    Raises:
        InputError: an unknown name or option, or an option's value that the strategy refuses.
    """
    options = {} if isinstance(choice, str) else dict(choice)
    name: Any = choice if isinstance(choice, str) else options.pop("name", None)
    if not isinstance(name, str) or name not in known:
        raise InputError(f"unknown {role} {name!r}; {nearest(str(name), known)}")
    # Every strategy is a dataclass, which the type of a Protocol cannot say; what it keeps for itself is no option.
    allowed = {field.name for field in fields(cast(Any, known[name])) if field.init}
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed) if allowed else "it has no options"
            raise InputError(f"{role} {name!r} has no option {option!r}; {hint}")
    for option in path_options(known[name]) & options.keys():
        if isinstance(options[option], str):
            options[option] = Path(options[option])
    return known[name](**options)


def path_options(strategy: Any) -> frozenset[str]:
    """Options of a strategy that name files: those whose default is a path."""
    return frozenset(field.name for field in fields(strategy) if isinstance(field.default, Path))


def anchored(known: Mapping[str, type[Any]], choice: Choice, folder: Path) -> Choice:
    """The choice with every relative path among its options made absolute, from `folder`."""
    name = choice.get("name") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(name, str) or name not in known:
        return choice
    given = {key: choice[key] for key in path_options(known[name]) & choice.keys()}
    paths = {key: Path(value).expanduser() for key, value in given.items() if isinstance(value, str)}
    return choice | {key: str((folder / path).resolve()) for key, path in paths.items()}


def contents(strategy: Any) -> dict[str, str]:
    """Option -> SHA-256 of the file that it names: what a strategy does depends on that, not on the file's name."""
    paths = {option: Path(getattr(strategy, option)) for option in path_options(strategy)}
    return {option: hashlib.sha256(path.read_bytes()).hexdigest() for option, path in sorted(paths.items())}


def check_positive(strategy: str, **values: float) -> None:
    """
    Raises:
        InputError: one of the values is not a finite number above zero.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InputError(f"option {name!r} of {strategy!r} is {value!r}; it must be a number above 0")


def check_count(strategy: str, **values: int) -> None:
    """
    Raises:
        InputError: one of the values is not a whole number above zero.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"option {name!r} of {strategy!r} is {value!r}; it must be a whole number above 0")


def check_fraction(strategy: str, **values: float) -> None:
    """
    Raises:
        InputError: one of the values is not a number between 0 and 1.
    """
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise InputError(f"option {name!r} of {strategy!r} is {value!r}; it must be a number between 0 and 1")


def check_path(strategy: str, **values: Path) -> None:
    """
    Raises:
        InputError: one of the values is not a path.
    """
    for name, value in values.items():
        if not isinstance(value, Path):
            raise InputError(f"option {name!r} of {strategy!r} is {value!r}; it must be the path of a file")
