"""`neft registry`: each look-up as a table and as JSON, aliases and tags, mistakes in a sentence, and a quick start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from flows.registry_options import registry_app
from neft.models import load_base
from neft.neurons import NeuronSet
from neft.routing import Signature
from neft.scoring import Scores
from registry import Entry, Registry
from tests.command import Neft, Outcome
from tests.registry.conftest import Pupil
from tests.tiny import ANIMALS, COLOURS, save_tiny, texts_of

#: Markup that a table would take for its own.
ODD = "[red]odd[bold]"
#: Such markup, without what it ends, and a command for the terminal.
EVIL = "[/] \x1b[2J"


@dataclass(frozen=True)
class Taught:
    """A registry in a home, and what was recorded in it."""

    home: Path
    sites: tuple[str, str]
    scores: Path

    def open(self) -> closing[Registry]:
        return closing(Registry.open(self.home / "registry"))

    def get(self, reference: str) -> Entry:
        with self.open() as registry:
            return registry.get(reference)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Taught:
    home = tmp_path_factory.mktemp("taught")
    base = save_tiny(home / "base")
    with closing(Registry.open(home / "registry")) as registry:
        pupil = Pupil(registry, base)
        model, tokenizer = load_base(str(base))
        lower, upper = (site.name for site in pupil.space.sites)
        draw = torch.Generator().manual_seed(0)
        scores = Scores(pupil.space, {name: torch.rand(64, generator=draw) for name in (lower, upper)})
        signatures = [Signature.of(model, tokenizer, texts_of(words)) for words in (COLOURS, ANIMALS)]
        for (task, neurons), signature in zip(
            {"film": range(10), "news": range(6, 20)}.items(), signatures, strict=True
        ):
            pupil.record(
                task,
                neurons=NeuronSet(pupil.space, {lower: neurons}),
                scores=scores,
                signature=signature,
                metrics={"accuracy": 0.75, "scores": {task: 0.5}},
            )
        pupil.parent = registry.get("film")
        pupil.record("film", neurons=NeuronSet(pupil.space, {upper: [1]}), reused_from=registry.get("news"))
        pupil.record(ODD, stream="odd", neurons=NeuronSet(pupil.space, {upper: [1]}))
        registry.set_alias("film@1", "champion")
        registry.set_tag("film@1", "stage", EVIL)
    scores.save(home / "scores.safetensors")
    return Taught(home, (lower, upper), home / "scores.safetensors")


@pytest.fixture
def at_home(taught: Taught, monkeypatch: pytest.MonkeyPatch) -> Taught:
    monkeypatch.setenv("NEFT_HOME", str(taught.home))
    return taught


@pytest.fixture
def asked(at_home: Taught, neft: Neft) -> Any:
    """Run `neft registry ARGUMENTS --json` and read what it says; the table is printed once, too."""

    def ask(*arguments: str | int) -> Any:
        printed = neft("registry", *arguments)
        assert printed.code == 0, printed.err
        outcome = neft("registry", *arguments, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return ask


def test_list(asked: Any, at_home: Taught, neft: Neft) -> None:
    assert [each["reference"] for each in asked("list")] == ["film@1", "news@1", "film@2", f"{ODD}@1"]
    assert [each["reference"] for each in asked("list", "--task", "film")] == ["film@1", "film@2"]
    printed = neft("registry", "list").out
    assert f"{ODD}@1" in printed


def test_show(asked: Any, at_home: Taught, neft: Neft) -> None:
    shown = asked("show", "film@champion")
    assert (shown["reference"], shown["aliases"], shown["tags"]) == ("film@1", ["champion"], {"stage": EVIL})
    assert shown["sites"] == {at_home.sites[0]: 10}
    assert asked("show", "film")["reused_from"] == "news@1"
    printed = neft("registry", "show", "film@1").out
    assert "champion" in printed and at_home.sites[0] in printed


def test_search(asked: Any, neft: Neft) -> None:
    found = asked("search", "task = 'film' OR tags.stage LIKE '[/]%'", "--order-by", "version")
    assert [each["reference"] for each in found["entries"]] == ["film@1", "film@2"]
    assert len(asked("search")["entries"]) == 4
    page = asked("search", "", "--max", "3")
    assert len(page["entries"]) == 3
    assert [each["reference"] for each in asked("search", "--page", page["next_token"])["entries"]] == ["film@1"]
    assert page["next_token"] in neft("registry", "search", "", "--max", "3").out


def test_a_filter_that_cannot_be_read_has_a_caret(at_home: Taught, neft: Neft) -> None:
    outcome = neft("registry", "search", "task = 'film' AND taks = 'x'")
    assert outcome.code == 2 and outcome.out == ""
    said, shown, caret = outcome.err.rstrip("\n").split("\n")
    assert said.startswith("neft: the filter cannot be read") and "did you mean 'task'?" in said
    assert shown[len(caret) - 1 :] == "taks = 'x'"


def test_tasks(asked: Any) -> None:
    found = {each["name"]: each for each in asked("tasks")}
    assert (found["film"]["versions"], found["film"]["newest"]) == (2, "film@2")
    assert found["film"]["aliases"] == {"champion": 1} and found[ODD]["streams"] == ["odd"]


def test_owners(asked: Any, at_home: Taught, neft: Neft) -> None:
    lower, upper = at_home.sites
    assert [each["entry"] for each in asked("owners", lower, 7)] == ["film@1", "news@1"]
    assert asked("owners", lower) == [
        {"entry": "film@1", "task": "film", "neurons": 10},
        {"entry": "news@1", "task": "news", "neurons": 14},
    ]
    assert [each["entry"] for each in asked("owners", upper, 1)] == ["film@2", f"{ODD}@1"]
    outcome = neft("registry", "owners", lower, 64)
    assert outcome.code == 2 and "neurons 0 to 63" in outcome.err


def test_overlap_and_diff(asked: Any, at_home: Taught, neft: Neft) -> None:
    found = asked("overlap", "film@champion", "news")
    assert (found["shared"], found["only_first"], found["only_second"]) == (4, 6, 10)
    assert found["sites"] == {at_home.sites[0]: 4}
    found = asked("diff", "film@1", "film@2")
    assert (found["added"], found["removed"], found["kept"]) == ({at_home.sites[1]: 1}, {at_home.sites[0]: 10}, 0)
    assert found["fields"]["metrics.scores.film"] == [0.5, None]
    assert "metrics.scores.film" in neft("registry", "diff", "film@1", "film@2").out


def test_overlaps(asked: Any, neft: Neft) -> None:
    found = asked("overlaps", "demo")
    assert found["entries"] == ["news@1", "film@2"] and found["shared"] == [[14, 0], [0, 1]]
    assert asked("overlaps", "odd")["entries"] == [f"{ODD}@1"]
    assert "did you mean 'demo'" in neft("registry", "overlaps", "dem").err


def test_nearest(asked: Any) -> None:
    found = asked("nearest", "film@1")
    assert [(each["entry"], each["value"]) for each in found[:1]] == [("news@1", 4 / 20)]
    assert len(found) == 3 and len(asked("nearest", "film@1", "-k", 1)) == 1


def test_nearest_to_a_file(asked: Any, at_home: Taught, tmp_path: Path) -> None:
    with at_home.open() as registry:
        registry.neurons(registry.get("film@1")).save(tmp_path / "set.safetensors")
    found = asked("nearest", str(tmp_path / "set.safetensors"), "-k", 1)
    assert found == [{"entry": "film@1", "task": "film", "value": 1.0}]
    # Both were recorded with these scores; of equals the newer comes first.
    found = asked("nearest", str(at_home.scores), "--by", "scores")
    assert [each["entry"] for each in found] == ["news@1", "film@1"]
    assert [each["entry"] for each in asked("nearest", "news@1", "--by", "scores")] == ["film@1"]


def test_capacity(asked: Any, at_home: Taught) -> None:
    lower, upper = asked("capacity", "news")
    assert (lower["site"], lower["owners"], lower["free"]) == (at_home.sites[0], {"film@1": 10, "news@1": 14}, 44)
    assert (upper["owners"], upper["free"]) == ({}, 64)


def test_lineage(asked: Any, neft: Neft) -> None:
    found = asked("lineage", "news")
    assert found["entry"] == "film@1"
    assert [(each["entry"], each["link"]) for each in found["children"]] == [("news@1", "parent"), ("film@2", "parent")]
    assert found["children"][0]["children"] == [{"entry": "film@2", "link": "reused from", "children": []}]
    printed = neft("registry", "lineage", "news").out.splitlines()
    assert [re.sub(r"^[│├└─\s]*", "", line).strip() for line in printed] == [
        "film@1",
        "news@1",
        "film@2 (reused from the one above)",
        "film@2",
        f"{ODD}@1",
    ]


def test_suggest(asked: Any, at_home: Taught, neft: Neft) -> None:
    by_file = asked("suggest", str(at_home.scores), "--budget", "0.1")
    assert {each["entry"] for each in by_file} == {"film@1", "news@1", "film@2", f"{ODD}@1"}
    assert by_file[0]["correlation"] == pytest.approx(1, abs=1e-3)
    assert asked("suggest", "film@1", "-k", 1)[0]["entry"] == "news@1"
    outcome = neft("registry", "suggest", "film@2")
    assert outcome.code == 2 and "film@2 was recorded without scores" in outcome.err
    assert "budget 3.0" in neft("registry", "suggest", "film@1", "--budget", 3).err


def test_route(asked: Any) -> None:
    found = asked("route", "news", "cow the fox hen", "red a blue green")
    assert [each["entry"] for each in found] == ["news@1", "film@1"]
    assert found[0]["text"] == "cow the fox hen"


def test_aliases_are_set_moved_and_deleted(asked: Any, at_home: Taught, neft: Neft) -> None:
    def say(*arguments: str | int) -> Outcome:
        return neft("registry", "alias", *arguments)

    assert json.loads(say("film", "best", "--json").out) == {"task": "film", "alias": "best", "entry": "film@2"}
    assert "best names film@1" in say("film", "best", "--version", 1).out
    assert at_home.get("film@best").version == 1
    assert "did you mean 'best'" in say("film", "bes", "--delete").err
    assert say("film", "best", "--delete").code == 0
    assert "no alias 'best'" in neft("registry", "show", "film@best").err
    assert say("film", "best", "--delete", "--version", 1).code == 2
    assert "cannot be used" in say("film", "9").err


def test_tags_are_set_and_deleted(asked: Any, at_home: Taught, neft: Neft) -> None:
    tagged = json.loads(neft("registry", "tag", "news", "stage", EVIL, "--json").out)
    assert tagged == {"entry": "news@1", "tags": {"stage": EVIL}}
    printed = neft("registry", "tag", "news", "other", "[/]").out
    assert "[/] ?[2J" in printed and "\x1b" not in printed
    assert json.loads(neft("registry", "tag", "news", "other", "--delete", "--json").out)["tags"] == {"stage": EVIL}
    assert json.loads(neft("registry", "tag", "news", "stage", "--delete", "--json").out)["tags"] == {}
    assert "has no tag 'stage'" in neft("registry", "tag", "news", "stage", "--delete").err
    for wrong in (("news", "stage"), ("news", "stage", "x", "--delete")):
        outcome = neft("registry", "tag", *wrong)
        assert outcome.code == 2 and "either a value or --delete" in outcome.err


def test_every_look_up_names_an_unknown_entry(at_home: Taught, neft: Neft) -> None:
    for command in (
        ["show", "flim"],
        ["overlap", "flim", "news"],
        ["nearest", "flim"],
        ["diff", "news", "flim"],
        ["capacity", "flim"],
        ["lineage", "flim"],
        ["suggest", "flim"],
        ["route", "flim", "text"],
        ["alias", "flim", "x"],
        ["tag", "flim", "x", "y"],
    ):
        outcome = neft("registry", *command)
        assert outcome.code == 2 and "did you mean 'film'?" in outcome.err, command


PROGRAM = """
import json, sys
from flows.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["neft", "registry", *words]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{words}: {stop.code}")
heavy = {"torch", "transformers", "peft", "mlflow", "prefect", "scipy", "sklearn"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""


def test_looking_up_imports_nothing_heavy(at_home: Taught) -> None:
    """What takes seconds to import is for what trains, reads scores or loads a model."""
    commands = [
        ["list"],
        ["search", "task = 'film'"],
        ["show", "film"],
        ["tasks"],
        ["lineage", "film"],
        ["owners", at_home.sites[0], "7"],
        ["overlap", "film@1", "news"],
        ["overlaps", "demo"],
        ["nearest", "film"],
        ["diff", "film@1", "film@2"],
        ["capacity", "film"],
        ["alias", "film", "latest"],
        ["alias", "film", "latest", "--delete"],
        ["tag", "film", "key", "value"],
        ["tag", "film", "key", "--delete"],
    ]
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_has_an_example_and_the_options_of_all(neft: Neft) -> None:
    commands = {
        command.name or command.callback.__name__: command.callback for command in registry_app.registered_commands
    }
    assert {"list", "search", "owners", "alias"} <= commands.keys()
    for name, callback in commands.items():
        assert f"Example: neft registry {name}" in (callback.__doc__ or ""), name
        hints = get_type_hints(callback)
        assert {"location", "debug"} <= hints.keys(), name
        assert "json_" in hints or name == "serve", name
