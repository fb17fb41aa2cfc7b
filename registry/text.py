"""What may be recorded: text and JSON that SQLite and PostgreSQL both keep and give back as they were."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from neft.errors import InputError

#: Longest name of a task or a stream, in characters; PostgreSQL's indexes hold no text of more than 2,700 bytes.
LONGEST_NAME = 250
#: Most bytes and levels of one field that is recorded as JSON.
MOST_BYTES, MOST_LEVELS = 2**20, 50

#: How JSON writes a NUL character: after an even number of backslashes, which stand for half as many.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def is_text(value: str) -> bool:
    """Whether the text can be kept: PostgreSQL refuses NUL characters, and half a surrogate pair is no Unicode."""
    if "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(value: str) -> str:
    """How a message quotes what may be long."""
    return repr(value) if len(value) <= 60 else f"{value[:60]!r}..."


def check_name(what: str, name: str) -> None:
    """The rule for names of tasks and streams: 1 to 250 printable characters, no `@` or `/`, no space at either end.

    `@` sets a version or an alias apart, `/` the parts of a URL. Printable rules out line breaks, NUL, and the marks
    that turn the direction of writing or take no room, by which two names would look the same.

    Args:
        what: what is named, for the message.

    Raises:
        InputError: the name breaks the rule.
    """
    if not (1 <= len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()) or set("@/") & set(name):
        raise InputError(
            f"{what} {shortened(name)} cannot be used; take 1 to {LONGEST_NAME} printable characters without '@' and "
            "'/', and without a space at either end"
        )


def plain(name: str, value: Any) -> Any:
    """A copy of `value` as JSON gives it back, of 1 MiB and 50 levels at most.

    Raises:
        InputError: it is not JSON, too large or too deep, or holds a number that is not finite or text that cannot be
            kept; `name` says which field.
    """
    if _deeper_than(MOST_LEVELS, value):
        raise InputError(f"{name} cannot be recorded: it is nested more than {MOST_LEVELS} deep; make it flatter")
    try:
        written = json.dumps(value, allow_nan=False, ensure_ascii=False)
        size = len(written.encode())
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} cannot be recorded: {error}; give finite numbers, text, lists and mappings"
        ) from error
    if size > MOST_BYTES:
        raise InputError(f"{name} cannot be recorded: it has {size} bytes as JSON, of {MOST_BYTES} at most; shorten it")
    if _NUL.search(written):
        raise InputError(f"{name} cannot be recorded: its text holds a NUL character; take that out")
    return json.loads(written)


def _deeper_than(levels: int, value: Any) -> bool:
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return levels < 0 or any(_deeper_than(levels - 1, child) for child in children)
