"""The command line: exit codes, one sentence for a mistake, JSON for scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.command import Neft
from tests.learnt import Learnt
from tests.tiny import write_stream


@pytest.fixture
def at_home(learnt: Learnt, monkeypatch: pytest.MonkeyPatch) -> Learnt:
    monkeypatch.setenv("NEFT_HOME", str(learnt.home.path))
    return learnt


def rewritten(folder: Path, change: Callable[[dict], None]) -> Path:  # YAML, of any shape
    """The tiny stream's config with one thing changed."""
    path = write_stream(folder)
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    return path


def _task(key: str, value: object) -> Callable[[dict], None]:
    return lambda config: config["tasks"][0].update({key: value})


def _set(key: str, value: object) -> Callable[[dict], None]:
    return lambda config: config.update({key: value})


BAD_INPUTS = {
    "missing file": (_task("data", {"files": {"train": "gone.jsonl", "eval": "gone.jsonl"}}), "gone.jsonl"),
    "template key that is no column": (_task("prompt", "Text: {txt}"), r"{txt}.*did you mean 'text'"),
    "label outside labels": (_task("labels", ["warm", "cool"]), "'cold' is not one of the labels"),
    "budget outside its range": (_set("method", {"budget": 0.9}), r"method\.budget.*0\.9"),
    "unknown kind": (_set("method", {"kinds": ["fnn"]}), r"method\.kinds.*fnn"),
    "unknown scorer": (_set("method", {"scorer": "tailor"}), "did you mean 'taylor'"),
    "unknown key": (_set("trainign", {}), "did you mean 'training'"),
    "model that is not there": (_set("model", {"name": "./gone"}), r"model\.name.*gone"),
    "model without the asked kind": (
        _set("model", {"name": "./model", "neurons": {"ffn": [{"up": "fc9", "down": "fc8"}]}}),
        "no neurons of kind 'ffn'",
    ),
    "probe that is not there": (_set("evaluation", {"general": ["gone.txt"]}), r"evaluation\.general.*gone\.txt"),
    "seed that is no number": (_set("seed", "x"), r"seed.*'x'"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, tmp_path: Path, home: Path, neft: Neft, prefect_server: None
) -> None:
    change, pattern = BAD_INPUTS[case]
    outcome = neft("run", rewritten(tmp_path, change))
    assert outcome.code == 2, outcome.err
    said = [line for line in outcome.err.splitlines() if line.startswith("neft: ")]
    assert len(said) == 1
    assert "Traceback" not in outcome.err
    assert re.search(pattern, outcome.err), outcome.err
    if (home / "registry" / "registry.db").exists():
        assert json.loads(neft("registry", "list", "--json").out) == []


def test_an_empty_data_file_is_named(tmp_path: Path, home: Path, neft: Neft, prefect_server: None) -> None:
    config = write_stream(tmp_path)
    (tmp_path / "colours-train.jsonl").write_text("")
    outcome = neft("run", config)
    assert outcome.code == 2
    assert "colours-train.jsonl is empty" in outcome.err


@pytest.mark.parametrize("key", ["tracking.mlflow", "tracking.prefect"])
def test_a_server_that_does_not_answer_is_named(
    key: str, tmp_path: Path, home: Path, neft: Neft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    outcome = neft("run", write_stream(tmp_path), "--set", f"{key}=http://127.0.0.1:9")
    assert outcome.code == 1
    assert key in outcome.err and "http://127.0.0.1:9 does not answer" in outcome.err
    assert not (home / "registry").exists()


def test_debug_shows_the_traceback(tmp_path: Path, home: Path, neft: Neft) -> None:
    from neft.errors import InputError

    with pytest.raises(InputError, match="no such config"):
        neft("run", tmp_path / "gone.yaml", "--debug")


def test_a_stream_that_was_learnt_before_prints_its_own_numbers(
    stream: Path, home: Path, neft: Neft, prefect_server: None
) -> None:
    short = ("--set", "training.max_steps=1")
    first = neft("run", stream, *short)
    assert neft("run", stream).out != first.out
    assert neft("run", stream, *short).out == first.out


def test_report_as_json_has_the_matrix_and_a_formula_for_every_metric(at_home: Learnt, neft: Neft) -> None:
    outcome = neft("report", "tiny", "--json")
    described = json.loads(outcome.out)
    assert described["matrix"] == (at_home.run.matrix or {})["rows"]
    assert described["metrics"].keys() == described["formulas"].keys()
    assert "backward_transfer" in described["metrics"]


def test_report_prints_every_score(at_home: Learnt, neft: Neft, tmp_path: Path) -> None:
    outcome = neft("report", "tiny", "--plot", tmp_path / "matrix.svg")
    for row in (at_home.run.matrix or {})["rows"]:
        for score in row:
            assert f"{score:.3f}" in outcome.out
    assert "max_{i<=l<T} R[l,i]" in " ".join(outcome.out.replace("│", " ").split())
    assert (tmp_path / "matrix.svg").read_text().lstrip().startswith("<?xml")


def test_report_of_an_unknown_stream_names_the_nearest(at_home: Learnt, neft: Neft) -> None:
    outcome = neft("report", "tinny")
    assert outcome.code == 2
    assert "did you mean 'tiny'" in outcome.err


def test_registry_list_and_show(at_home: Learnt, neft: Neft) -> None:
    listed = json.loads(neft("registry", "list", "--json").out)
    assert [entry["reference"] for entry in listed] == ["colours@1", "animals@1", "places@1"]
    shown = json.loads(neft("registry", "show", "animals", "--json").out)
    assert shown["parent"] == "colours@1"
    assert sum(shown["sites"].values()) == shown["neuron_count"] == 32
    assert "animals@1" in neft("registry", "list").out
    printed = neft("registry", "show", "animals@1").out
    assert "state_digest" in printed
    for site, (before, after) in shown["metrics"]["capacity"].items():
        cells = next(line for line in printed.splitlines() if site in line).replace("│", " ").split()
        assert cells[cells.index(site) + 1 :] == [str(shown["sites"][site]), str(before), str(after)]


def test_checkout_writes_a_plain_model_bit_for_bit(at_home: Learnt, neft: Neft, tmp_path: Path) -> None:
    folder = tmp_path / "checked-out"
    outcome = neft("registry", "checkout", "animals", "--to", folder, "--json")
    assert json.loads(outcome.out)["entry"] == "animals@1"
    with at_home.registry() as registry:
        expected, _ = registry.checkout("animals")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_checkout_refuses_a_folder_that_is_there_and_a_task_that_is_not(
    at_home: Learnt, neft: Neft, tmp_path: Path
) -> None:
    assert neft("registry", "checkout", "animals", "--to", tmp_path).code == 2
    outcome = neft("registry", "checkout", "anmals", "--to", tmp_path / "new")
    assert outcome.code == 2 and "animals" in outcome.err
    assert not (tmp_path / "new").exists()


def test_no_registry_is_said(home: Path, neft: Neft) -> None:
    outcome = neft("registry", "list")
    assert outcome.code == 2
    assert "there is no registry" in outcome.err
