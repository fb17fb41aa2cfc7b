"""Aliases and tags on both databases: they move and go, entries stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from neft.errors import InputError
from registry import Registry
from registry.labels import LONGEST_NAME, LONGEST_VALUE
from tests.registry.conftest import Pupil

HOSTILE = "x'); DROP TABLE entry_tags; --"


@pytest.fixture
def pupil(anywhere: Registry, base: Path) -> Pupil:
    """A pupil on each database."""
    return Pupil(anywhere, base)


def test_an_alias_names_one_entry_of_its_task_and_moves(pupil: Pupil, anywhere: Registry) -> None:
    first, other, second = (pupil.record(name) for name in ("film", "news", "film"))
    assert anywhere.set_alias("film", "champion") == second
    assert anywhere.set_alias("film", "champion", version=1) == first
    assert anywhere.set_alias("film@champion", "oldest") == first
    assert anywhere.set_alias("news", "champion") == other
    assert anywhere.get("film@champion") == first and anywhere.get("news@champion") == other
    assert anywhere.aliases(first) == ("champion", "oldest") and anywhere.aliases(second) == ()
    assert anywhere.aliases_of("film") == {"champion": 1, "oldest": 1}
    anywhere.delete_alias("film", "champion")
    assert anywhere.aliases_of("film") == {"oldest": 1} and anywhere.aliases_of("news") == {"champion": 1}
    with pytest.raises(InputError, match=r"task 'film' has no alias 'champion'; known: oldest"):
        anywhere.get("film@champion")


@pytest.mark.parametrize("alias", ["", "9", "1st", "a b", "a@b", "-x", "é", "a\n", "x" * (LONGEST_NAME + 1), HOSTILE])
def test_an_alias_that_cannot_be_written_is_refused(registry: Registry, alias: str) -> None:
    with pytest.raises(InputError, match="cannot be used; begin with a letter"):
        registry.set_alias("film", alias)


def test_what_is_not_there_gets_no_alias(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film")
    for call, complaint in (
        (lambda: anywhere.set_alias("flim", "x"), "did you mean 'film'"),
        (lambda: anywhere.set_alias("film", "x", version=2), "no version 2"),
        (lambda: anywhere.delete_alias("film", "x"), "has no alias 'x'; it has none"),
        (lambda: anywhere.aliases_of("flim"), "did you mean 'film'"),
    ):
        with pytest.raises(InputError, match=complaint):
            call()


def test_tags_are_noted_replaced_and_taken_off(pupil: Pupil, anywhere: Registry) -> None:
    entry = pupil.record("film")
    pupil.record("film")
    anywhere.set_tag("film@1", "stage", "prod")
    anywhere.set_tag(entry, "stage", "größer 日本 'x'")
    anywhere.set_tag(entry, HOSTILE, HOSTILE)
    anywhere.set_tag(entry, "empty", "")
    assert anywhere.tags(entry) == {"empty": "", "stage": "größer 日本 'x'", HOSTILE: HOSTILE}
    assert anywhere.tags(anywhere.get("film@2")) == {}
    anywhere.delete_tag("film@1", HOSTILE)
    assert anywhere.tags(entry).keys() == {"empty", "stage"}
    with pytest.raises(InputError, match=r"no tag 'stag'; did you mean 'stage'"):
        anywhere.delete_tag(entry, "stag")
    assert anywhere.get("film@1") == entry


@pytest.mark.parametrize(
    ("key", "value"), [("", "x"), (" ", "x"), ("k" * (LONGEST_NAME + 1), "x"), ("k", "v" * (LONGEST_VALUE + 1))]
)
def test_a_tag_that_is_no_note_is_refused(pupil: Pupil, anywhere: Registry, key: str, value: str) -> None:
    entry = pupil.record("film")
    with pytest.raises(InputError, match=r"tag .* cannot be set"):
        anywhere.set_tag(entry, key, value)
    assert anywhere.tags(entry) == {}


def test_labels_are_of_one_base_model(
    pupil: Pupil, new_pupil: Callable[..., Pupil], other_base: Path, anywhere: Registry
) -> None:
    pupil.record("film")
    theirs = new_pupil(anywhere, other_base).record("film")
    with pytest.raises(InputError, match="several base models"):
        anywhere.set_alias("film", "champion")
    assert anywhere.set_alias("film", "champion", base_model=str(other_base)) == theirs
    assert anywhere.aliases_of("film", base_model=pupil.base) == {}
    with pytest.raises(InputError, match="several base models"):
        anywhere.get("film@champion")
    assert anywhere.get("film@champion", base_model=theirs.base_model.fingerprint) == theirs
