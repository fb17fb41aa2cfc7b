"""The filter syntax of a search, read into a tree; what cannot be read is refused with a caret under it.

filter     = [ or ]
or         = and { OR and }
and        = not { AND not }
not        = { NOT } ( "(" or ")" | comparison )
comparison = key ( = | != | < | <= | > | >= ) value
           | key [ NOT ] ( LIKE | ILIKE ) text
           | key [ NOT ] IN "(" value { "," value } ")"
           | key IS [ NOT ] NULL
key        = attribute | tags.NAME | metrics.NAME      a NAME may stand in backquotes or double quotes
value      = text in single quotes, '' for one in it | number
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, NoReturn, cast

from neft.errors import InputError

#: Longest filter, in characters; most comparisons in one, and the deepest nesting: what a database takes.
LONGEST, MOST, DEEPEST = 10_000, 200, 50

Comparator = Literal["=", "!=", "<", "<=", ">", ">=", "LIKE", "ILIKE", "IN", "IS NULL"]
Value = str | int | float

_KEYWORDS = {"AND", "OR", "NOT", "LIKE", "ILIKE", "IN", "IS", "NULL"}
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<text>'(?:[^']|'')*')
    | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<word>[^\W\d]\w*)(?P<name>\.(?:`[^`]*`|"[^"]*"|[\w./-]+))?
    | (?P<sign><=|>=|!=|<>|[=<>(),])
    | (?P<end>\Z)
    )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    """A piece of a filter: its kind, as it is written, what it says, and where it begins."""

    kind: Literal["text", "number", "key", "keyword", "sign", "end"]
    written: str
    value: Value
    place: int
    #: The name after the dot of a key: of a tag or a metric.
    name: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A key held against values; `places` say where each of them stands, for complaints."""

    key: Token
    comparator: Comparator
    values: tuple[Token, ...]


@dataclass(frozen=True)
class Not:
    """What does not fit `inner`."""

    inner: Tree


@dataclass(frozen=True)
class Junction:
    """What fits all of `parts`, or any."""

    word: Literal["AND", "OR"]
    parts: tuple[Tree, ...]


Tree = Comparison | Not | Junction


def complain(text: str, place: int, complaint: str, what: str = "filter") -> NoReturn:
    """
    Args:
        text: the filter.
        place: where in it.
        complaint: what is wrong there, and what was expected.
        what: what the text is.

    Raises:
        InputError: always; with the text and a caret under the place.
    """
    # A long one is shown around the place.
    start = max(0, place - 60)
    shown = "".join(character if character.isprintable() else " " for character in text[start : place + 60])
    shown = ("..." if start else "") + shown + ("..." if place + 60 < len(text) else "")
    width = sum(map(_width, shown[: place - start + (3 if start else 0)]))
    raise InputError(f"the {what} cannot be read: {complaint}\n  {shown}\n  {' ' * width}^")


def _width(character: str) -> int:
    """Cells that a terminal gives a character."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def tokens(text: str, what: str = "filter") -> list[Token]:
    """The pieces of a filter, or of another text in its words.

    Raises:
        InputError: something in it is none, or it is too long.
    """
    if len(text) > LONGEST:
        raise InputError(f"the {what} has {len(text)} characters; {LONGEST} are the most")
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad is not None:
        complain(text, bad.start(), f"no entry can hold the character {bad[0]!r}; leave it out", what)
    found: list[Token] = []
    place = 0
    while not found or found[-1].kind != "end":
        match = _TOKEN.match(text, place)
        if match is None:
            blank = re.compile(r"\s*").match(text, place)
            _refuse_piece(text, blank.end() if blank else place, what)
        found.append(_token(match, text, what))
        place = match.end()
    return found


def _refuse_piece(text: str, place: int, what: str) -> NoReturn:
    character = text[place]
    if character == "'":
        complain(text, place, "this text has no end; close it with a single quote, and write '' for one in it", what)
    if character in '"`':
        complain(text, place, "text stands in single quotes; these are for names, as in metrics.`a name`", what)
    if character.isdecimal():
        complain(text, place, "this is no number; put text in single quotes", what)
    complain(text, place, f"{character!r} was not expected here", what)


def _token(match: re.Match[str], text: str, what: str) -> Token:
    kind = next(name for name in ("text", "number", "word", "sign", "end") if match[name] is not None)
    written, place = match[kind], match.start(kind)
    if kind == "text":
        value = written[1:-1].replace("''", "'")
        return Token("text", written, value, place)
    if kind == "number":
        number = int(written) if re.fullmatch(r"[+-]?\d{1,19}", written) else float(written)
        if abs(number) >= 2**63:
            number = float(number)
        if not math.isfinite(number):
            complain(text, place, "this number is not finite", what)
        return Token("number", written, number, place)
    if kind == "word":
        if match["name"] is None and written.upper() in _KEYWORDS:
            return Token("keyword", written, written.upper(), place)
        name = match["name"]
        if name is not None:
            name = name[1:]
            name = name[1:-1] if name[0] in '`"' else name
        return Token("key", written, written, place, name)
    return Token("sign" if kind == "sign" else "end", written, "!=" if written == "<>" else written, place)


def parse(text: str) -> Tree | None:
    """The tree of a filter; None for an empty one.

    Raises:
        InputError: it cannot be read; says where, and what was expected.
    """
    return _Parser(text).all()


class _Parser:
    """Goes through the pieces of a filter from left to right."""

    def __init__(self, text: str):
        self._text, self._tokens, self._next = text, tokens(text), 0
        self._comparisons = self._depth = 0

    def all(self) -> Tree | None:
        if self._is_end():
            return None
        found = self._or()
        if not self._is_end():
            self._refuse("AND, OR or the end of the filter")
        return found

    @property
    def _here(self) -> Token:
        return self._tokens[self._next]

    def _take(self) -> Token:
        token = self._here
        self._next += 1
        return token

    def _is_end(self) -> bool:
        return self._here.kind == "end"

    def _is(self, *written: str) -> bool:
        return self._here.kind in ("keyword", "sign") and self._here.value in written

    def _expect(self, written: str, expected: str) -> Token:
        if not self._is(written):
            self._refuse(expected)
        return self._take()

    def _refuse(self, expected: str) -> NoReturn:
        here = self._here
        found = "it ends here" if here.kind == "end" else f"{here.written!r} stands here"
        complain(self._text, here.place, f"{expected} was expected, but {found}")

    def _or(self) -> Tree:
        parts = [self._and()]
        while self._is("OR"):
            self._take()
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else Junction("OR", tuple(parts))

    def _and(self) -> Tree:
        parts = [self._not()]
        while self._is("AND"):
            self._take()
            parts.append(self._not())
        return parts[0] if len(parts) == 1 else Junction("AND", tuple(parts))

    def _not(self) -> Tree:
        self._depth += 1
        if self._depth > DEEPEST:
            complain(self._text, self._here.place, f"this is nested deeper than {DEEPEST}; write it flatter")
        found = self._inner()
        self._depth -= 1
        return found

    def _inner(self) -> Tree:
        if self._is("NOT"):
            self._take()
            return Not(self._not())
        if self._is("("):
            self._take()
            found = self._or()
            self._expect(")", "AND, OR or ')'")
            return found
        return self._comparison()

    def _comparison(self) -> Tree:
        self._comparisons += 1
        if self._comparisons > MOST:
            complain(self._text, self._here.place, f"this is the comparison after {MOST}; ask in several searches")
        if self._here.kind != "key":
            self._refuse("an attribute, tags.NAME or metrics.NAME")
        key = self._take()
        if self._is("IS"):
            self._take()
            negated = self._is("NOT")
            if negated:
                self._take()
            self._expect("NULL", "NULL" if negated else "NULL or NOT NULL")
            found: Tree = Comparison(key, "IS NULL", ())
            return Not(found) if negated else found
        if self._is("=", "!=", "<", "<=", ">", ">="):
            comparator = cast("Comparator", self._take().value)
            return Comparison(key, comparator, (self._value(),))
        if self._is("NOT"):
            self._take()
            if not self._is("LIKE", "ILIKE", "IN"):
                self._refuse("LIKE, ILIKE or IN")
            return Not(self._listed(key))
        if not self._is("LIKE", "ILIKE", "IN"):
            self._refuse("a comparator (=, !=, <, <=, >, >=, LIKE, ILIKE, IN, NOT IN, IS NULL, IS NOT NULL)")
        return self._listed(key)

    def _listed(self, key: Token) -> Comparison:
        """What follows LIKE, ILIKE or IN."""
        word = self._take().value
        if word != "IN":
            if self._here.kind != "text":
                self._refuse("text in single quotes")
            return Comparison(key, "LIKE" if word == "LIKE" else "ILIKE", (self._take(),))
        self._expect("(", "'('")
        values = [self._value()]
        while self._is(","):
            self._take()
            values.append(self._value())
        self._expect(")", "',' or ')'")
        return Comparison(key, "IN", tuple(values))

    def _value(self) -> Token:
        if self._here.kind not in ("text", "number"):
            self._refuse("a number, or text in single quotes,")
        return self._take()
