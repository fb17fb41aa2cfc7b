"""Whether a registry is whole: everything that is missing, damaged or left over is found, and only that removed."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from sqlalchemy import text

from neft.scoring import Scores
from registry.integrity import Orphan, Problem
from tests.registry.conftest import Place

OLD = 3 * 24 * 3600


@pytest.fixture
def entries(anywhere, base, new_pupil):
    """Two entries; the second has scores, and the same overlay as a third."""
    pupil = new_pupil(anywhere, base)
    scores = Scores(pupil.space, {site.name: torch.rand(site.size) for site in pupil.space.sites})
    films = pupil.record("films")
    new = pupil.learn("news", scores=scores)
    news = anywhere.record(new)
    pupil.parent = news
    new.overlay.lay_on(pupil.model)
    return [films, news, pupil.record("mail", neurons=new.neurons, overlay=new.overlay)]


def stray(place: Place, name: str, age: float = OLD, content: bytes = b"rows") -> Path:
    """A file in the store that no entry names."""
    path = place.artifacts / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_whole_registry_is_whole(anywhere, entries):
    report = anywhere.verify()
    assert (report.whole, report.problems, report.orphans) == (True, (), ())
    assert (report.entries, report.files) == (3, 3)
    assert report.bytes == sum({file.sha256: file.bytes for entry in entries for file in entry.files}.values())
    assert anywhere.gc(older_than=timedelta(0)).orphans == ()
    assert anywhere.verify() == report


def test_an_empty_registry_is_whole(anywhere):
    assert anywhere.verify().to_dict() == {
        "entries": 0,
        "files": 0,
        "bytes": 0,
        "problems": (),
        "orphans": (),
        "whole": True,
    }
    assert anywhere.gc(older_than=timedelta(0)).bytes == 0


@pytest.mark.parametrize("fault", ["missing", "truncated", "altered", "longer", "unreadable"])
def test_every_damaged_file_is_found_with_its_entries(anywhere, entries, fault):
    file = entries[1].overlay_file
    path = anywhere.artifacts.path(file.sha256)
    content = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(content[:-1])
    elif fault == "altered":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "longer":
        path.write_bytes(content + b"\0")
    elif fault == "unreadable":
        path.symlink_to(path)
    found = "altered" if fault == "longer" else fault
    problem = Problem("file", found, f"overlay {file.sha256}", ("news@1", "mail@1"))
    assert anywhere.verify().problems == (problem,)
    assert str(problem) == f"overlay {file.sha256} of news@1, mail@1 is {found}"
    assert anywhere.verify(deep=False).problems == (() if fault == "altered" else (problem,))
    assert anywhere.gc(older_than=timedelta(0)).orphans == ()
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    assert anywhere.verify().whole


OTHERS = "(SELECT bitmap FROM neuron_sets WHERE entry_id = :other)"


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("DELETE FROM neuron_sets WHERE entry_id = :id", "missing"),
        ("UPDATE neuron_sets SET bitmap = :none WHERE entry_id = :id", "altered"),
        (f"UPDATE neuron_sets SET bitmap = {OTHERS} WHERE entry_id = :id", "altered"),
    ],
    ids=["gone", "no bitmap", "those of another"],
)
def test_damaged_neurons_are_found(anywhere, entries, place, base, new_pupil, statement, fault):
    """Behind the back of the triggers that keep them."""
    pupil = new_pupil(anywhere, base, step=5)
    other = pupil.record("few", neurons=pupil.of(0))
    with place.sql() as connection:
        if place.kind == "sqlite":
            for each in ("update", "delete"):
                connection.execute(text(f"DROP TRIGGER neuron_sets_no_{each}"))
        else:
            connection.execute(text("ALTER TABLE neuron_sets DISABLE TRIGGER USER"))
        given = {"id": entries[0].id, "other": other.id, "none": b"\1\2\3"}
        connection.execute(text(statement), {name: given[name] for name in given if f":{name}" in statement})
    report = anywhere.verify()
    assert report.problems == (Problem("neurons", fault, "the set of neurons", ("films@1",)),)
    assert not report.whole


def test_what_belongs_to_nothing_is_told_apart(anywhere, entries, place):
    sha256 = "ab" + "0" * 62
    stray(place, f"ab/{sha256}.safetensors")
    stray(place, f"ab/.{sha256}.safetensors.x1y2")
    stray(place, ".incoming-abc/overlay.safetensors", content=b"half")
    stray(place, f"cd/{sha256}.safetensors")
    stray(place, "readme.txt")
    report = anywhere.verify()
    assert report.whole
    assert report.orphans == (
        Orphan(".incoming-abc/overlay.safetensors", "half-written", 4),
        Orphan(f"ab/.{sha256}.safetensors.x1y2", "half-written", 4),
        Orphan(f"ab/{sha256}.safetensors", "orphan", 4),
        Orphan(f"cd/{sha256}.safetensors", "foreign", 4),
        Orphan("readme.txt", "foreign", 4),
    )


def test_gc_removes_orphans_only(anywhere, entries, place):
    sha256 = "ab" + "0" * 62
    orphan = stray(place, f"ab/{sha256}.safetensors")
    half = stray(place, ".incoming-abc/overlay.safetensors")
    mine = stray(place, "readme.txt")
    young = stray(place, f"ab/{'ab' + '1' * 62}.safetensors", age=3600)
    for entry in entries:
        for file in entry.files:
            os.utime(anywhere.artifacts.path(file.sha256), (time.time() - OLD,) * 2)

    tried = anywhere.gc(dry_run=True)
    assert tried.to_dict()["dry_run"] and orphan.exists() and half.exists()
    removed = anywhere.gc()
    assert removed.orphans == tried.orphans
    assert [each.path for each in removed.orphans] == [".incoming-abc/overlay.safetensors", f"ab/{sha256}.safetensors"]
    assert removed.bytes == 8
    assert not orphan.exists() and not half.parent.exists()
    assert mine.exists() and young.exists()
    assert anywhere.gc().orphans == ()
    assert anywhere.verify().whole
    assert [each.path for each in anywhere.gc(older_than=timedelta(minutes=30)).orphans] == [f"ab/{young.name}"]
    anywhere.checkout("news")


def test_what_is_recorded_while_gc_runs_stays(registry, pupil, monkeypatch):
    """The entry of an old file is recorded between gc's look at the database and its removal of the file."""
    new = pupil.learn("films")
    file = registry.artifacts.put("overlay", new.overlay.save)
    path = registry.artifacts.path(file.sha256)
    os.utime(path, (time.time() - OLD,) * 2)
    listed = list(registry.artifacts.stored())

    def stored():
        yield from listed
        registry.record(new)
        os.utime(path, (time.time() - OLD,) * 2)

    monkeypatch.setattr(registry.artifacts, "stored", stored)
    assert registry.gc().orphans == ()
    assert path.exists()


def test_what_is_stored_again_while_gc_runs_stays(registry, pupil, monkeypatch):
    """An old orphan whose content a writer stores now, before it records its entry."""
    new = pupil.learn("films")
    file = registry.artifacts.put("overlay", new.overlay.save)
    path = registry.artifacts.path(file.sha256)
    os.utime(path, (time.time() - OLD,) * 2)
    listed = list(registry.artifacts.stored())
    monkeypatch.setattr(registry.artifacts, "stored", lambda: iter(listed))
    registry.artifacts.put("overlay", new.overlay.save)
    assert registry.gc().orphans == ()
    assert registry.record(new).overlay_file == file
    registry.checkout("films")
