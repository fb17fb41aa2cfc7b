"""Killed at any step of recording, as by `kill -9`, the registry is as before or as after, never between."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from sqlalchemy import event, text
from sqlalchemy.orm import Session

import neft.files
import registry.artifacts
import registry.database
from neft.memory import Memory
from neft.routing import Signature
from neft.scoring import Scores
from registry import Entry, NewEntry, Registry
from tests.registry.conftest import Place, Pupil
from tests.registry.processes import die, is_killed

FILES = ("overlay", "scores", "memory", "signature")


@pytest.fixture(scope="module")
def new(base: Path, tmp_path_factory: pytest.TempPathFactory) -> NewEntry:
    """A task that has been learnt, with a file of every kind."""
    with closing(Registry.open(tmp_path_factory.mktemp("elsewhere"))) as elsewhere:
        pupil = Pupil(elsewhere, base)
        scores = Scores(pupil.space, {site.name: torch.rand(site.size) for site in pupil.space.sites})
        signature = Signature(torch.zeros(4), torch.eye(4)[:1], torch.ones(1), 1.0, -8.0, 1, None)
        return pupil.learn("sst2", scores=scores, memory=Memory("soft", {"x": torch.rand(3)}), signature=signature)


def on_call(number: int, original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """The original, but at its call of that number, from 1, something else."""
    calls = iter(range(1, sys.maxsize))

    def called(*arguments: Any, **named: Any) -> Any:
        return (instead if next(calls) == number else original)(*arguments, **named)

    return called


def before_a_file(number: int) -> None:
    registry.artifacts.FolderStore.put = on_call(number, registry.artifacts.FolderStore.put, die)


def while_a_file_is_written(number: int) -> None:
    def half(tensors: Any, path: Path, **named: Any) -> None:
        write(tensors, path, **named)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die()

    write = neft.files.save_file
    neft.files.save_file = on_call(number, write, half)


def before_a_renaming(number: int) -> None:
    Path.replace = on_call(number, Path.replace, die)


def after_a_renaming(number: int) -> None:
    def rename_and_die(path: Path, target: Path) -> None:
        rename(path, target)
        die()

    rename = Path.replace
    Path.replace = on_call(number, rename, rename_and_die)


def before_the_transaction() -> None:
    registry.database.Database.write = die


def after_a_flush(number: int) -> None:
    event.listen(Session, "after_flush_postexec", on_call(number, lambda *_: None, die))


def before_the_commit() -> None:
    event.listen(Session, "before_commit", die)


def after_the_commit() -> None:
    event.listen(Session, "after_commit", die)


#: Every file is renamed three times: as it is written, to the folder where it belongs, and to its name.
STEPS: dict[str, Callable[[], None]] = {
    **{f"before the {name}": partial(before_a_file, number) for number, name in enumerate(FILES, 1)},
    **{f"in the {name}": partial(while_a_file_is_written, number) for number, name in enumerate(FILES, 1)},
    **{f"before renaming {number}": partial(before_a_renaming, number) for number in (1, 2, 3, 12)},
    **{f"after renaming {number}": partial(after_a_renaming, number) for number in (1, 2, 3, 12)},
    "before the transaction": before_the_transaction,
    **{f"after flush {number}": partial(after_a_flush, number) for number in (1, 2, 3, 4)},
    "before the commit": before_the_commit,
    "after the commit": after_the_commit,
}


def add_base(opened: Registry, new: NewEntry) -> None:
    opened.add_base_model(new.base_model, "a folder", "float32", {}, 1)


def check_whole(opened: Registry, place: Place) -> None:
    """Whatever is recorded is all there, and a file that has a checksum for its name has that content."""
    with place.sql() as connection:
        counts = {table: connection.scalar(text(f"SELECT count(*) FROM {table}")) for table in ("entries", "tasks")}
        for table in ("neuron_sets", "entry_metrics"):
            counts[table] = connection.scalar(text(f"SELECT count(DISTINCT entry_id) FROM {table}"))
    assert set(counts.values()) == {len(opened.list())}, counts
    for stored in opened.artifacts.stored():
        content = place.artifacts.joinpath(stored.path).read_bytes()
        assert stored.sha256 in (None, hashlib.sha256(content).hexdigest()), stored.path


def check_recorded(opened: Registry, entry: Entry, new: NewEntry) -> None:
    """The entry is the one that was recorded, in every part."""
    assert (entry.task, entry.version, entry.input_digest) == (new.task, 1, new.input_digest)
    assert entry.metrics == new.metrics
    assert opened.neurons(entry) == new.neurons
    read = [opened.overlay(entry).values, opened.scores(entry).values, opened.memory(entry).tensors]
    for found, given in zip(read, (new.overlay.values, new.scores.values, new.memory.tensors), strict=True):
        assert all(torch.allclose(found[name], given[name], rtol=1e-3, atol=1e-6) for name in given)
    assert torch.equal(opened.signature(entry).components, new.signature.components)
    assert opened.record(new) == entry


#: Those at a file are alike for both databases, so PostgreSQL has the first and the last of them alone.
ON_POSTGRESQL = (
    "in the overlay",
    "after renaming 12",
    *(step for step in STEPS if "flush" in step or "commit" in step),
)


@pytest.mark.parametrize(
    ("place", "step"),
    [("sqlite", step) for step in STEPS] + [("postgresql", step) for step in ON_POSTGRESQL],
    indirect=["place"],
)
def test_killed_at_a_step(place: Place, new: NewEntry, step: str) -> None:
    with closing(place.open()) as opened:
        add_base(opened, new)

    def record_and_die() -> None:
        mine = place.open()
        STEPS[step]()
        mine.record(new)

    assert is_killed(record_and_die)
    with closing(place.open()) as after:
        assert [entry.version for entry in after.list()] == ([1] if step == "after the commit" else [])
        check_whole(after, place)
        check_recorded(after, after.record(new), new)
        check_whole(after, place)


@cache
def is_ours(file: str) -> bool:
    return Path(file).parent in {Path(module.__file__).parent for module in (registry, neft.files)}


class LineCounter:
    """Counts the lines of neft's and the registry's code that are run, and calls `at_line` at one of them."""

    def __init__(self, line: int | None = None):
        self.count, self.line = 0, line

    def __call__(self, frame: FrameType, kind: str, argument: object) -> LineCounter | None:
        if kind == "line":
            self.count += 1
            if self.count == self.line:
                die()
        return self if is_ours(frame.f_code.co_filename) else None

    def of(self, work: Callable[[], object]) -> int:
        """How many lines the work runs."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)
        return self.count


def versions_of(new: NewEntry) -> Iterator[NewEntry]:
    """The same under other names and with other rows."""
    for number in range(1, 1000):
        values = {name: rows + number for name, rows in new.overlay.values.items()}
        overlay = replace(new.overlay, values=values)
        yield replace(new, task=f"task{number}", input_digest=f"digest{number}", overlay=overlay)


def test_killed_at_any_line(place: Place, new: NewEntry) -> None:
    tasks = versions_of(new)
    with closing(place.open()) as opened:
        add_base(opened, new)
        opened.record(next(tasks))
        task = next(tasks)
        lines = LineCounter().of(partial(opened.record, task))
        assert lines > 200
        for line in range(lines // 20, lines, lines // 10):
            task = next(tasks)

            def record_and_die(line: int = line, task: NewEntry = task) -> None:
                mine = place.open()
                LineCounter(line).of(lambda: mine.record(task))

            assert is_killed(record_and_die)
            check_whole(opened, place)
            check_recorded(opened, opened.record(task), task)
