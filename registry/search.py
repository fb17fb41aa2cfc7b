"""Search: a filter (`registry.filters` has its syntax) and an order, as one query with bound parameters.

Attributes: task, version, stream, base_model (a name, or how a fingerprint begins), alias, parent, reused_from and
forgets (`task@version`), neurons, parameters, seed, created (an ISO date), mlflow_run_id, prefect_flow_run_id,
input_digest, data_fingerprint; beside them tags.KEY and metrics.NAME.

What an entry does not have equals nothing and differs from nothing, so `tags.stage != 'prod'` finds entries with
another stage, and `NOT tags.stage = 'prod'` those without one, too. `alias` is every alias of an entry: `alias !=
'champion'` finds those that do not have it among theirs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Float,
    Select,
    String,
    and_,
    false,
    func,
    literal,
    not_,
    or_,
    select,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from neft.errors import InputError, nearest
from registry.filters import Comparison, Junction, Not, Token, Tree, complain, parse, tokens
from registry.schema import AliasRow, BaseModelRow, EntryRow, MetricRow, TagRow, TaskRow

_Condition = ColumnElement[bool]

#: Attributes that are one column each, by the kind of their values.
_TEXTS: Mapping[str, Any] = {
    "task": TaskRow.name,
    "stream": EntryRow.stream,
    "parent": EntryRow.parent,
    "reused_from": EntryRow.reused_from,
    "forgets": EntryRow.forgets,
    "mlflow_run_id": EntryRow.mlflow_run_id,
    "prefect_flow_run_id": EntryRow.prefect_flow_run_id,
    "input_digest": EntryRow.input_digest,
    "data_fingerprint": EntryRow.data_fingerprint,
}
_NUMBERS: Mapping[str, Any] = {
    "version": EntryRow.version,
    "neurons": EntryRow.neuron_count,
    "parameters": EntryRow.parameter_count,
    "seed": EntryRow.seed,
}
_ATTRIBUTES = (*_TEXTS, *_NUMBERS, "created", "alias", "base_model")
_GROUPS = ("tags", "metrics")

_SIGNS: Mapping[str, Callable[[Any, Any], _Condition]] = {
    "=": lambda column, value: column == value,
    "!=": lambda column, value: column != value,
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}


class _Bytewise(FunctionElement[str]):
    """Text that is ordered by its bytes, on every database; PostgreSQL's own order is that of a language."""

    type = String()
    inherit_cache = True


@compiles(_Bytewise)
def _plain(element: _Bytewise, compiler: SQLCompiler, **options: Any) -> str:
    return compiler.process(element.clauses, **options)


@compiles(_Bytewise, "postgresql")
def _collated(element: _Bytewise, compiler: SQLCompiler, **options: Any) -> str:
    return f'({compiler.process(element.clauses, **options)}) COLLATE "C"'


@dataclass(frozen=True)
class Search:
    """A search that was read: its query without an order, the order, and a digest of what was asked."""

    query: Select[tuple[EntryRow]]
    order: tuple[ColumnElement[Any], ...]
    digest: str

    @classmethod
    def of(cls, text: str, order_by: Sequence[str] = ()) -> Search:
        """
        Args:
            text: the filter.
            order_by: keys, each with ASC or DESC after it or nothing.

        Raises:
            InputError: one of them cannot be read; says where, and what was expected.
        """
        tree = parse(text)
        query = select(EntryRow).join(TaskRow, EntryRow.task_id == TaskRow.id).join(BaseModelRow)
        if tree is not None:
            query = query.where(_Reader(text).condition(tree))
        order = tuple(_order(each) for each in order_by)
        return cls(query, order, hashlib.sha256(json.dumps([text, *order_by]).encode()).hexdigest()[:16])

    def page(self, session: Session, max_results: int, page_token: str | None) -> tuple[Sequence[EntryRow], str | None]:
        """The rows of a page, and the token of the next.

        Raises:
            InputError: fewer than 1 entry is asked for, or the token is of another search.
        """
        if max_results < 1:
            raise InputError(f"max_results is {max_results}; ask for 1 entry or more")
        start, last = self._read_token(page_token) if page_token else (0, session.scalar(select(func.max(EntryRow.id))))
        # Entries that are recorded while somebody turns pages are left out, so that none is shown twice.
        query = self.query.where(EntryRow.id <= (last or 0)).order_by(*self.order, EntryRow.id.desc())
        rows = session.scalars(query.offset(start).limit(max_results + 1)).all()
        if len(rows) <= max_results:
            return rows, None
        token = json.dumps([self.digest, start + max_results, last])
        return rows[:max_results], base64.urlsafe_b64encode(token.encode()).decode()

    def _read_token(self, token: str) -> tuple[int, int]:
        try:
            digest, start, last = json.loads(base64.urlsafe_b64decode(token.encode()))
            known = digest == self.digest and all(type(each) is int and 0 <= each < 2**63 for each in (start, last))
        except (ValueError, TypeError, binascii.Error, RecursionError):
            known, start, last = False, 0, 0
        if not known:
            raise InputError("the page token is not of this search; give the next_token of the same filter and order")
        return start, last


def _order(item: str) -> ColumnElement[Any]:
    """One item of `order_by`; what has no value comes last."""
    what = "order"
    key, *rest = tokens(item, what)
    if key.kind != "key":
        complain(item, key.place, "an attribute, tags.NAME or metrics.NAME was expected", what)
    column = _sort_column(item, key)
    direction, end = (rest[0].written.upper(), rest[-1]) if len(rest) == 2 else ("", rest[0])
    if end.kind != "end" or direction not in ("", "ASC", "DESC"):
        complain(item, rest[0].place, "ASC, DESC or nothing was expected", what)
    return (column.desc() if direction == "DESC" else column.asc()).nulls_last()


def _sort_column(item: str, key: Token) -> ColumnElement[Any]:
    _check_key(item, key, "order")
    name = str(key.value)
    if name == "alias":
        complain(item, key.place, "an entry may have several aliases; order by another attribute", "order")
    if name == "tags":
        value = select(TagRow.value).where(TagRow.entry_id == EntryRow.id, TagRow.key == key.name)
        return _Bytewise(value.correlate(EntryRow).scalar_subquery())
    if name == "metrics":
        number = select(MetricRow.value).where(MetricRow.entry_id == EntryRow.id, MetricRow.name == key.name)
        return number.correlate(EntryRow).scalar_subquery()
    if name == "created":
        return _column(EntryRow.created_at)
    if name == "base_model":
        return _Bytewise(BaseModelRow.name)
    return _column(_NUMBERS[name]) if name in _NUMBERS else _Bytewise(_TEXTS[name])


def _column(column: Any) -> ColumnElement[Any]:
    return cast("ColumnElement[Any]", column)


def _check_key(text: str, key: Token, what: str = "filter") -> None:
    """
    Raises:
        InputError: there is no such attribute.
    """
    name = str(key.value)
    if name in _GROUPS:
        if not key.name:
            complain(text, key.place, f"{name} needs a name: {name}.NAME, or {name}.`A NAME`", what)
    elif key.name is not None:
        complain(text, key.place, f"only tags and metrics have names after a dot, not {name!r}", what)
    elif name not in _ATTRIBUTES:
        hint = nearest(name, [*_ATTRIBUTES, "tags.NAME", "metrics.NAME"])
        complain(text, key.place, f"there is no attribute {name!r}; {hint}", what)


class _Reader:
    """Makes conditions of a filter's tree. Every condition is true or false, never unknown, so that NOT means not."""

    def __init__(self, text: str):
        self._text = text

    def condition(self, tree: Tree) -> _Condition:
        if isinstance(tree, Junction):
            parts = [self.condition(part) for part in tree.parts]
            return and_(*parts) if tree.word == "AND" else or_(*parts)
        if isinstance(tree, Not):
            return not_(self.condition(tree.inner))
        return self._comparison(tree)

    def _comparison(self, found: Comparison) -> _Condition:
        _check_key(self._text, found.key)
        name = str(found.key.value)
        if name in _GROUPS or name == "alias":
            return self._of_rows(name, found)
        if name == "base_model":
            return self._base_model(found)
        if name == "created":
            return self._known(EntryRow.created_at, found, self._moment)
        if name in _NUMBERS:
            return self._known(_NUMBERS[name], found, self._number)
        return self._known(_TEXTS[name], found, self._text_of)

    def _of_rows(self, name: str, found: Comparison) -> _Condition:
        """A condition on what an entry may have several of."""
        if name == "metrics":
            rows = select(MetricRow.entry_id).where(MetricRow.name == found.key.name)
            return self._among(rows, found, lambda: self._number(MetricRow.value, found))
        if name == "tags":
            rows = select(TagRow.entry_id).where(TagRow.key == found.key.name)
            return self._among(rows, found, lambda: self._text_of(TagRow.value, found))
        if found.comparator == "!=":
            return not_(self._of_rows(name, Comparison(found.key, "=", found.values)))
        return self._among(select(AliasRow.entry_id), found, lambda: self._text_of(AliasRow.name, found))

    def _among(self, rows: Select[tuple[int]], found: Comparison, condition: Callable[[], _Condition]) -> _Condition:
        """Whether the entry has such a row."""
        if found.comparator == "IS NULL":
            return EntryRow.id.not_in(rows)
        return EntryRow.id.in_(rows.where(condition()))

    def _known(self, column: Any, found: Comparison, make: Callable[[Any, Comparison], _Condition]) -> _Condition:
        """A condition on a column that may have no value."""
        if found.comparator == "IS NULL":
            return _column(column).is_(None)
        return and_(_column(column).is_not(None), make(column, found))

    def _base_model(self, found: Comparison) -> _Condition:
        if found.comparator == "IS NULL":
            return false()
        if found.comparator in ("=", "!=", "IN"):
            names = [self._word(value) for value in found.values]
            same = or_(
                *(
                    or_(BaseModelRow.name == name, BaseModelRow.fingerprint.startswith(name, autoescape=True))
                    if name
                    else BaseModelRow.name == name
                    for name in names
                )
            )
            return not_(same) if found.comparator == "!=" else same
        return self._text_of(BaseModelRow.name, found)

    def _text_of(self, column: Any, found: Comparison) -> _Condition:
        values = [self._word(value) for value in found.values]
        if found.comparator == "IN":
            return _column(column).in_(values)
        if found.comparator in ("LIKE", "ILIKE"):
            # A backslash is itself: only SQL's own % and _ stand for others.
            pattern = values[0].replace("\\", "\\\\")
            if found.comparator == "LIKE":
                return _column(column).like(pattern, escape="\\")
            return func.lower(column).like(func.lower(pattern), escape="\\")
        if found.comparator in ("=", "!="):
            return _SIGNS[found.comparator](column, values[0])
        return _SIGNS[found.comparator](_Bytewise(column), values[0])

    def _number(self, column: Any, found: Comparison) -> _Condition:
        self._refuse_like(found, "a number")
        values = []
        for value in found.values:
            if value.kind != "number":
                self._refuse_value(value, f"{_written(found.key)} is compared with a number")
            # Said to be what it is: as a whole number, a database may round it.
            values.append(literal(value.value, BigInteger() if isinstance(value.value, int) else Float()))
        return _column(column).in_(values) if found.comparator == "IN" else _SIGNS[found.comparator](column, values[0])

    def _moment(self, column: Any, found: Comparison) -> _Condition:
        self._refuse_like(found, "a date")
        values = []
        for value in found.values:
            written = self._word(value)
            try:
                moment = datetime.fromisoformat(written)
                moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
            except (ValueError, OverflowError):
                self._refuse_value(value, "this is no date; write '2026-01-31' or '2026-01-31T12:00:00', which is UTC")
            values.append(moment)
        return _column(column).in_(values) if found.comparator == "IN" else _SIGNS[found.comparator](column, values[0])

    def _word(self, value: Token) -> str:
        if not isinstance(value.value, str):
            self._refuse_value(value, f"text was expected; put it in single quotes: '{value.written}'")
        return value.value

    def _refuse_like(self, found: Comparison, what: str) -> None:
        if found.comparator in ("LIKE", "ILIKE"):
            use = f"{found.comparator} cannot compare it; use =, !=, <, <=, >, >= or IN"
            complain(self._text, found.values[0].place, f"{_written(found.key)} is {what}, and {use}")

    def _refuse_value(self, value: Token, complaint: str) -> NoReturn:
        complain(self._text, value.place, complaint)


def _written(key: Token) -> str:
    return str(key.value) if key.name is None else f"{key.value}.{key.name}"
