"""Strategies found by name: a scorer, policy or baseline built from the words of a config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

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
    allowed = {field.name for field in fields(known[name])}  # type: ignore[arg-type]
    for option in options:
        if option not in allowed:
            hint = nearest(option, allowed) if allowed else "it has no options"
            raise InputError(f"{role} {name!r} has no option {option!r}; {hint}")
    return known[name](**options)


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
