"""The LM Evaluation Harness as a general probe, on a tiny local task; `make test-harness` has the harness at hand."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from neft.audit import state_digest
from neft.errors import InputError
from neft.evaluation import EvaluationSpec, completion_log_likelihoods
from neft.harness import HarnessProbe, load_harness
from neft.tasks import Example
from tests.tiny import ANIMALS, COLOURS, tiny_model, tiny_tokenizer

NEEDED = "lm_eval is not installed: the LM Evaluation Harness is NOT TESTED here; run `make test-harness`"
CHOICES = [" warm", " cold"]


def write_task(folder: Path, name: str = "tiny_colours", **changes: object) -> Path:
    """A multiple-choice task of twelve questions, as the harness has it; returns the folder."""
    folder.mkdir(exist_ok=True)
    questions = [{"text": f"the {word}", "choices": CHOICES, "gold": n % 2} for n, word in enumerate(COLOURS + ANIMALS)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Text: {{text}} Kind:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))
    return folder


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason=NEEDED)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def probe(folder: Path, name: str = "tiny_colours", limit: int | None = None) -> HarnessProbe:
    (found,) = load_harness(EvaluationSpec(harness=(name,), harness_include=folder, harness_limit=limit, batch_size=4))
    return found


@pytest.mark.usefixtures("cached")
def test_accuracy_is_that_of_the_likelier_choice_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, tokenizer = tiny_model().train(), tiny_tokenizer()
    before, drawn = state_digest(model), (random.getstate(), torch.get_rng_state())
    accuracy, count = probe(write_task(tmp_path / "tasks")).accuracy(model, tokenizer)
    assert model.training
    assert state_digest(model) == before
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    examples = [Example(f"Text: the {word} Kind:", "") for word in COLOURS + ANIMALS]
    # Without the end token, which ours count too.
    ours = completion_log_likelihoods(model.eval(), no_end(), examples, CHOICES).argmax(-1).tolist()
    assert count == 12
    assert accuracy == pytest.approx(sum(found == n % 2 for n, found in enumerate(ours)) / 12)
    assert 0 < accuracy < 1


def no_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.usefixtures("cached")
def test_a_limit_asks_fewer_questions_and_is_another_probe(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks")
    whole, part = probe(folder), probe(folder, limit=5)
    assert part.accuracy(tiny_model(), tiny_tokenizer())[1] == 5
    assert whole.fingerprint != part.fingerprint


@pytest.mark.usefixtures("cached")
def test_a_probe_is_known_by_what_it_asks_not_by_where_that_lies(tmp_path: Path) -> None:
    one, two = probe(write_task(tmp_path / "one")), probe(write_task(tmp_path / "two"))
    assert one == two
    other = probe(write_task(tmp_path / "three", doc_to_text="Text: {{text}}"))
    assert other.fingerprint != one.fingerprint


@pytest.mark.usefixtures("cached")
def test_normalised_accuracy_serves_where_there_is_no_other(tmp_path: Path) -> None:
    metric = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
    found = probe(write_task(tmp_path / "tasks", metric_list=[metric]))
    assert 0 <= found.accuracy(tiny_model(), tiny_tokenizer())[0] <= 1


@pytest.mark.usefixtures("cached")
def test_a_task_without_accuracy_is_refused(tmp_path: Path) -> None:
    metric = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
    with pytest.raises(InputError, match="'tiny_colours' has no accuracy"):
        probe(write_task(tmp_path / "tasks", metric_list=[metric])).accuracy(tiny_model(), tiny_tokenizer())


@pytest.mark.usefixtures("cached")
def test_a_task_whose_questions_are_gone_is_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks")
    (folder / "questions.jsonl").unlink()
    with pytest.raises(InputError, match=r"evaluation\.harness: 'tiny_colours' cannot be loaded"):
        probe(folder)


@pytest.mark.usefixtures("cached")
def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.harness: unknown task 'no_such_task'"):
        probe(write_task(tmp_path / "tasks"), "no_such_task")


@pytest.mark.usefixtures("cached")
def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.harness_include: no such folder: .*gone"):
        probe(tmp_path / "gone")


def test_without_the_harness_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"^evaluation\.harness names .* by `pip install 'neft\[lm-eval\]'`"):
        load_harness(EvaluationSpec(harness=("arc_easy",)))
    assert load_harness(EvaluationSpec()) == ()
