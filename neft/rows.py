"""Rows of data files: JSONL, CSV and Parquet, read as they are written.

Values are neither guessed at nor cached: a date, `NA` or `007` in a CSV file is text, and a file that changed is read
anew, whatever its time stamp says.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Longest CSV cell, in characters; Python's own limit of 131,072 is shorter than some documents.
_LONGEST_CELL = 2**31 - 1


def _read_lines(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [_row(line, f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    return _checked(row, where)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'{where} is not an object such as {{"text": "...", "label": "..."}}')
    return row


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _read_lines(path)
    return [_checked(row, f"item {number}") for number, row in enumerate(json.loads(text), 1)]


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"its header names {max(header, key=header.count)!r} twice")
        rows = []
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells under a header of {len(header)}")
            if cells:
                # An empty cell is how CSV writes a missing value.
                rows.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    rows: list[Row] = parquet.read_table(path).to_pylist()
    return rows


#: A data file's ending -> its reader.
READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def read_rows(path: Path) -> list[Row]:
    """The rows of a data file, by its ending; None stands for a missing value.

    Raises:
        ValueError: what is wrong with the file's content, and where.
        OSError: the file cannot be read.
    """
    try:
        return READERS[path.suffix.lower()](path)
    except csv.Error as error:
        raise ValueError(str(error)) from error


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Every column that a row has, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
