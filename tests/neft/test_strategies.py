"""Strategies by name: built from a config's words, or refused with a hint."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from neft.baselines import BASELINES
from neft.errors import InputError
from neft.keystone import DEFAULT_PROMPTS
from neft.protection import POLICIES
from neft.scoring import SCORERS
from neft.scoring.similarity import Similarity
from neft.strategies import anchored, build, contents

FAMILIES: dict[str, dict[str, type[Any]]] = {"scorer": SCORERS, "protection policy": POLICIES, "baseline": BASELINES}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, known in FAMILIES.items() for name in known])
def test_each_is_built_by_its_name_alone(role: str, name: str) -> None:
    made = build(role, FAMILIES[role], name)
    assert type(made) is FAMILIES[role][name]
    assert made == build(role, FAMILIES[role], {"name": name})
    assert made.name == name
    assert "name" not in {field.name for field in fields(made)}


def test_options_become_fields() -> None:
    assert build("scorer", SCORERS, {"name": "similarity", "steps": 7}) == Similarity(steps=7, learning_rate=2e-5)


def test_the_choice_itself_is_not_changed() -> None:
    choice = {"name": "similarity", "steps": 7}
    build("scorer", SCORERS, choice)
    assert choice == {"name": "similarity", "steps": 7}


@pytest.mark.parametrize(
    ("role", "choice", "words"),
    [
        ("scorer", "tailor", "unknown scorer 'tailor'; did you mean 'taylor'?"),
        ("scorer", "xyz", "known: activation, fisher, keystone, random, similarity, taylor, weight"),
        ("scorer", {"steps": 3}, "unknown scorer None"),
        ("scorer", {"name": ["taylor"]}, "unknown scorer ['taylor']"),
        ("scorer", {"name": "taylor", "steps": 3}, "'taylor' has no option 'steps'; it has no options"),
        ("scorer", {"name": "similarity", "step": 3}, "no option 'step'; did you mean 'steps'?"),
        (
            "scorer",
            {"name": "similarity", "steps": 0},
            "'steps' of 'similarity' is 0; it must be a whole number above 0",
        ),
        ("scorer", {"name": "similarity", "steps": 2.5}, "whole number"),
        ("scorer", {"name": "similarity", "steps": True}, "whole number"),
        ("scorer", {"name": "similarity", "learning_rate": "big"}, "'big'; it must be a number above 0"),
        ("scorer", {"name": "similarity", "learning_rate": float("nan")}, "number above 0"),
        ("scorer", {"name": "similarity", "learning_rate": float("inf")}, "number above 0"),
        ("protection policy", "exclud", "unknown protection policy 'exclud'; did you mean 'exclude'?"),
        ("baseline", "lara", "unknown baseline 'lara'; did you mean 'lora'?"),
        ("baseline", {"name": "lora", "r": 8.5}, "'r' of 'lora' is 8.5; it must be a whole number above 0"),
        ("baseline", {"name": "lora", "alpha": -1}, "'alpha' of 'lora' is -1"),
        ("baseline", {"name": "lora", "replay": -1}, "'replay' of 'lora' is -1"),
        ("baseline", {"name": "olora", "weight": 0}, "'weight' of 'olora' is 0"),
        ("baseline", {"name": "ewc", "weight": -2}, "'weight' of 'ewc' is -2"),
        ("baseline", {"name": "ewc", "examples": 0.5}, "'examples' of 'ewc' is 0.5"),
        ("baseline", {"name": "replay", "share": 1}, "'share' of 'replay' is 1; it must be a number between 0 and 1"),
        ("baseline", {"name": "replay", "kept": []}, "'replay' has no option 'kept'; known: examples, share"),
        ("baseline", {"name": "osf", "effective_rank": 0}, "'effective_rank' of 'osf' is 0; it must be a whole number"),
        ("baseline", {"name": "osf", "effective_rank": 1.5}, "'effective_rank' of 'osf' is 1.5; it must be a number"),
        ("baseline", {"name": "joint", "by": "lara"}, "to learn by 'lara'; did you mean 'lora'?"),
    ],
)
def test_a_wrong_word_is_refused_with_a_hint(role: str, choice: Any, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        build(role, FAMILIES[role], choice)


# Options that name files


def write_prompts(path: Path, maths: str = "1 + 1 =") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"maths: '{maths}'\ncode: 'def'\n")
    return path


def test_text_becomes_a_path(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "mine.yaml")
    for choice in (str(path), path):
        assert build("scorer", SCORERS, {"name": "keystone", "prompts": choice}).prompts == path
    with pytest.raises(InputError, match=r"option 'prompts' of 'keystone' is \['a'\]; it must be the path"):
        build("scorer", SCORERS, {"name": "keystone", "prompts": ["a"]})


def test_relative_paths_are_anchored_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))

    def prompts(given: Any) -> Any:
        choice = anchored(SCORERS, {"name": "keystone", "rho": 0.1, "prompts": given}, tmp_path / "here")
        assert isinstance(choice, dict) and choice["rho"] == 0.1 and choice["name"] == "keystone"
        return choice["prompts"]

    assert prompts("mine.yaml") == str(tmp_path / "here" / "mine.yaml")
    assert prompts("../mine.yaml") == str(tmp_path / "mine.yaml")
    assert prompts("/data/mine.yaml") == "/data/mine.yaml"
    assert prompts("~/mine.yaml") == str(tmp_path / "me" / "mine.yaml")
    assert prompts(3) == 3


@pytest.mark.parametrize(
    "choice", ["taylor", "keystone", {"name": "keystone"}, {"name": "similarity", "steps": 3}, {"name": ["x"]}, {}]
)
def test_a_choice_without_paths_stays_as_it_is(choice: Any) -> None:
    assert anchored(SCORERS, choice, Path("/somewhere")) == choice


def test_the_contents_of_files_tell_strategies_apart_and_their_names_do_not(tmp_path: Path) -> None:
    first, same, other = (
        contents(build("scorer", SCORERS, {"name": "keystone", "prompts": write_prompts(tmp_path / place, maths)}))
        for place, maths in (("a/p.yaml", "1 + 1 ="), ("b/q.yaml", "1 + 1 ="), ("c/p.yaml", "2 + 2 ="))
    )
    assert list(first) == ["prompts"]
    assert first == same != other
    assert contents(build("scorer", SCORERS, "taylor")) == {}
    assert contents(build("scorer", SCORERS, "keystone")) == contents(
        build("protection policy", POLICIES, {"name": "keystone", "prompts": DEFAULT_PROMPTS})
    )
