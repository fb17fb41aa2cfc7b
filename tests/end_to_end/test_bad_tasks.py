"""Tasks that streams are not made for, and tasks that fail: what is learnt, what stays, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flows import learning
from flows.config import load_config
from flows.home import Home
from flows.report import as_json
from flows.tracking import Tracker
from flows.workbench import Workbench
from neft.audit import state_digest
from neft.errors import FailedError, RecordError
from neft.evaluation import EvaluationSpec, evaluate
from neft.forgetting import AccuracyMatrix
from neft.tasks import Task, load_task
from neft.training import TrainingResult
from registry import Registry, Run
from tests.command import Neft
from tests.learnt import Learnt, learn
from tests.tiny import TASKS, write_stream

pytestmark = pytest.mark.usefixtures("prefect_server")

Rows = list[dict[str, str]]
NAMES = [name for name, _, _ in TASKS]
SHORT = {"max_steps": 4, "learning_rate": 0.02, "max_length": 16}


def write(folder: Path, changed: Mapping[str, Callable[[Rows], Rows]], **changes: Any) -> Path:
    """A stream of `colours` under several names, each with its training and evaluation rows changed."""
    path = write_stream(folder, tasks=1, evaluation={}, **changes)
    config = yaml.safe_load(path.read_text())
    (first,) = config["tasks"]
    config["tasks"] = []
    for name, change in changed.items():
        files = {}
        for part in ("train", "eval"):
            rows = [json.loads(line) for line in (folder / f"colours-{part}.jsonl").read_text().splitlines()]
            files[part] = f"{name}-{part}-changed.jsonl"
            (folder / files[part]).write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
        config["tasks"].append(first | {"name": name, "data": {"files": files}})
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def same(rows: Rows) -> Rows:
    return rows


def contradicted(rows: Rows) -> Rows:
    other = {"warm": "cold", "cold": "warm"}
    return [{**row, "label": other[row["label"]]} for row in rows]


def ten(rows: Rows) -> Rows:
    return rows[:10]


def foreign(rows: Rows) -> Rows:
    return [{**row, "text": " ".join(word[::-1].upper() for word in row["text"].split())} for row in rows]


def matrix_of(run: Run) -> AccuracyMatrix:
    return AccuracyMatrix.from_dict(run.matrix or {})


# Tasks of an odd kind


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Learnt:
    """A task, the same one under another name, and one that says the opposite of the same texts."""
    folder = tmp_path_factory.mktemp("odd")
    tasks = {"first": same, "twin": same, "opposite": contradicted}
    return learn(write(folder, tasks), folder / "home")


def test_a_task_that_is_known_already_gets_neurons_of_its_own_and_nothing_is_lost(odd: Learnt) -> None:
    rows = matrix_of(odd.run).rows
    with odd.registry() as registry:
        first, twin = (registry.neurons(registry.get(name)) for name in ("first", "twin"))
    assert len(first) == len(twin) == 32
    assert len(first & twin) == 0
    assert rows[1][0] == rows[1][1]
    assert rows[2][0] == rows[2][1]
    assert (rows[2][1] or 0) >= (rows[1][0] or 0) - 0.05 >= 0.7


def test_a_task_that_contradicts_another_is_learnt_and_the_loss_is_shown_for_what_it_is(odd: Learnt) -> None:
    matrix = matrix_of(odd.run)
    first, _, opposite = matrix.rows[3]
    assert first is not None and opposite is not None
    assert opposite >= 0.7
    assert first == pytest.approx(1 - opposite)
    assert (odd.run.metrics or {})["forgetting"] > 0.4


def test_what_was_forgotten_is_still_there_to_be_checked_out(odd: Learnt) -> None:
    config = load_config(odd.config)
    spec = EvaluationSpec(max_length=config.training.max_length)
    with odd.registry() as registry:
        model, tokenizer = registry.checkout("first")
    scores = [evaluate(model, tokenizer, load_task(task, config.seed), spec).value for task in config.tasks]
    assert tuple(scores) == matrix_of(odd.run).rows[1]


def test_few_rows_and_unknown_words_are_learnt_from_as_far_as_they_go(tmp_path: Path) -> None:
    config = write(tmp_path, {"few": ten, "foreign": foreign}, training={**SHORT, "max_steps": 12})
    found = learn(config, tmp_path / "home")
    assert found.run.status == "finished"
    with found.registry() as registry:
        entries = [registry.get(name) for name in ("few", "foreign")]
        model, _ = registry.checkout("foreign")
    assert [entry.metrics["training_steps"] for entry in entries] == [12, 12]  # two batches of the ten rows an epoch
    assert all(0 < entry.metrics["training_loss"] < 20 for entry in entries)
    assert all(torch.isfinite(weights).all() for weights in model.state_dict().values())
    assert matrix_of(found.run).rows[2][1] == 0.5  # every text is <unk>, so all are answered alike


# More tasks than there is room for

HALVES = {"budget": 0.5, "scorer": "weight"}


@pytest.mark.parametrize("when_full", ["error", "spill"])
def test_a_full_model_stops_the_stream_or_skips_the_task(tmp_path: Path, when_full: str) -> None:
    method = {**HALVES, "protection": {"name": "exclude", "when_full": when_full}}
    config = write_stream(tmp_path, method=method, training=SHORT, evaluation={})
    with pytest.raises(FailedError, match=r"where 0 neurons are free .*lower method\.budget"):
        learn(config, tmp_path / "home")
    with closing(Registry.open(Home(tmp_path / "home").registry)) as registry:
        stopped = registry.newest_run("tiny")
        assert (stopped.status, matrix_of(stopped).learnt) == ("failed", 2)
    # The stream goes on from where it stopped.
    found = learn(config, tmp_path / "home", "on_failure=skip")
    assert found.run.id == stopped.id
    assert found.run.status == "finished"
    rows = matrix_of(found.run).rows
    assert len(rows) == 4
    assert rows[3] == rows[2]
    assert "0 neurons are free" in as_json(found.run)["skipped"]["places"]
    with found.registry() as registry:
        assert [entry.task for entry in registry.list()] == NAMES[:2]


def test_a_full_model_shares_the_neurons_that_matter_least(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = {**HALVES, "protection": {"name": "exclude", "when_full": "share"}}
    found = learn(write_stream(tmp_path, method=method, training=SHORT, evaluation={}), tmp_path / "home")
    assert "is full: 32 neurons that matter least to earlier tasks are shared" in capsys.readouterr().err
    with found.registry() as registry:
        sets = [registry.neurons(registry.get(name)) for name in NAMES]
        capacity = registry.get("places").metrics["capacity"]
    assert [len(each) for each in sets] == [64, 64, 64]
    assert len(sets[0] & sets[1]) == 0
    assert all(free == [0, 0] for free in capacity.values())


# Tasks that fail


@dataclass
class Trouble:
    """Makes the second task's training fail in one of several ways, and looks at the model once it was rolled back."""

    kind: str
    states: list[str] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        real_train, real_roll_back = learning.train, Workbench.roll_back

        def train(model: Any, tokenizer: Any, task: Task, spec: Any, *rest: Any) -> TrainingResult:
            if task.name != "animals":
                return real_train(model, tokenizer, task, spec, *rest)
            if self.kind == "diverges":
                return real_train(model, tokenizer, task, spec.model_copy(update={"learning_rate": 1e30}), *rest)
            if self.kind == "raises in the middle":
                return real_train(model, tokenizer, task, spec.model_copy(update={"logging_steps": 2}), 0, self.stop)
            result = real_train(model, tokenizer, task, spec, *rest)
            if self.kind == "changes other weights":
                with torch.no_grad():
                    model.get_base_model().model.norm.weight[0] += 1e-3
            return result

        def roll_back(bench: Workbench) -> None:
            real_roll_back(bench)
            self.states.append(state_digest(bench.standing.model))

        patch.setattr(learning, "train", train)
        patch.setattr(Workbench, "roll_back", roll_back)

    @staticmethod
    def stop(step: int, values: Mapping[str, float]) -> None:
        raise FailedError("the lamp went out; light it")


SAID = {
    "diverges": "training diverged",
    "raises in the middle": "the lamp went out",
    "changes other weights": "failed its audit",
}


def test_a_failed_task_stops_the_stream_and_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = Trouble("diverges")
    trouble.install(monkeypatch)
    config = write_stream(tmp_path, training=SHORT, evaluation={})
    with pytest.raises(FailedError, match=r"'animals': training diverged.*lower training\.learning_rate"):
        learn(config, tmp_path / "home")
    found = Home(tmp_path / "home")
    with closing(Registry.open(found.registry)) as registry:
        (entry,) = registry.list()
        run = registry.newest_run("tiny")
        assert state_digest(registry.checkout(entry)[0]) == entry.state_digest
    assert trouble.states == [entry.state_digest]
    assert run.status == "failed" and "training diverged" in (run.error or "")
    assert as_json(run)["skipped"] == {}
    task = mlflow_runs(Learnt(config, found, run))["animals"]
    assert task.info.status == "FAILED" and "training diverged" in task.data.tags["neft.error"]


@pytest.mark.parametrize("kind", SAID)
def test_a_failed_task_can_be_skipped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble = Trouble(kind)
    trouble.install(monkeypatch)
    config = write_stream(tmp_path, on_failure="skip", training=SHORT, evaluation={})
    found = learn(config, tmp_path / "home")
    assert f"[2/3] animals: skipped: {as_json(found.run)['skipped']['animals']}" in capsys.readouterr().err
    assert SAID[kind] in as_json(found.run)["skipped"]["animals"]
    assert (found.run.status, found.run.error) == ("finished", None)
    with found.registry() as registry:
        assert [(entry.reference, entry.parent) for entry in registry.list()] == [
            ("colours@1", None),
            ("places@1", "colours@1"),
        ]
        assert trouble.states == [registry.get("colours").state_digest]
        for name in ("colours", "places"):
            assert state_digest(registry.checkout(name)[0]) == registry.get(name).state_digest
    rows = matrix_of(found.run).rows
    assert len(rows) == 4
    assert rows[2] == rows[1]
    shown = mlflow_runs(found)
    assert {name: run.info.status for name, run in shown.items()} == {
        "tiny": "FINISHED",
        "colours": "FINISHED",
        "animals": "FAILED",
        "places": "FINISHED",
    }
    assert shown["animals"].data.tags["neft.error"] == as_json(found.run)["skipped"]["animals"]


def test_the_task_after_a_skipped_one_is_learnt_and_the_skipped_one_tried_again_when_its_config_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, neft: Neft
) -> None:
    monkeypatch.setenv("NEFT_HOME", str(tmp_path / "home"))
    config = write_stream(tmp_path, on_failure="skip")
    with monkeypatch.context() as patch:
        Trouble("diverges").install(patch)
        found = learn(config, tmp_path / "home")
    rows = matrix_of(found.run).rows
    assert (rows[3][2] or 0) >= 0.7
    assert rows[2] == rows[1]
    assert "animals (skipped)" in neft("report", "tiny").out
    assert "run 1, but for animals, skipped): nothing to do" in neft("run", str(config)).err
    # What else is measured is no part of what went into the task.
    said = neft("run", str(config), "--set", "evaluation.general=[]").err
    assert "animals: skipped before, and not tried again before its config changes: task 'animals'" in said
    assert said.count("not learnt again") == 2
    again = learn(config, tmp_path / "home", "training.learning_rate=0.01")
    assert as_json(again.run)["skipped"] == {}
    with again.registry() as registry:
        assert registry.get("animals").parent == "colours@2"


def test_a_skipped_task_stays_so_when_its_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_stream(tmp_path, on_failure="skip", training=SHORT, evaluation={})
    with monkeypatch.context() as patch:
        Trouble("diverges").install(patch)
        patch.setattr(Workbench, "finish", lambda bench: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learn(config, tmp_path / "home")
    found = learn(config, tmp_path / "home")
    assert found.run.id == 1
    assert list(as_json(found.run)["skipped"]) == ["animals"]
    assert mlflow_runs(found)["animals"].info.status == "FAILED"


def test_a_failing_record_is_no_fault_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*args: Any) -> None:
        raise RecordError("MLflow is gone; mend it")

    monkeypatch.setattr(Tracker, "log_neurons", gone)
    with pytest.raises(RecordError, match="MLflow is gone"):
        learn(write_stream(tmp_path, on_failure="skip", training=SHORT, evaluation={}), tmp_path / "home")


def test_a_damaged_file_of_an_earlier_task_is_no_fault_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Registry.scores

    def damaged(registry: Registry, entry: Any) -> Any:
        file = next((tmp_path / "home" / "registry").rglob(f"{entry.scores_file.sha256}*"))
        file.write_bytes(file.read_bytes()[:-1])
        return real(registry, entry)

    monkeypatch.setattr(Registry, "scores", damaged)
    with pytest.raises(RecordError, match=r"colours@1"):
        learn(write_stream(tmp_path, on_failure="skip", training=SHORT, evaluation={}), tmp_path / "home")


def test_a_baseline_skips_a_failed_task_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = Trouble("diverges")
    trouble.install(monkeypatch)
    training = {**SHORT, "learning_rate": 0.005}
    config = write_stream(tmp_path, on_failure="skip", method={"baseline": "lora"}, training=training, evaluation={})
    found = learn(config, tmp_path / "home")
    rows = matrix_of(found.run).rows
    assert len(rows) == 4
    assert rows[2] == rows[1]
    assert rows[3] != rows[2]
    assert len(trouble.states) == 1
    assert list(as_json(found.run)["skipped"]) == ["animals"]


def mlflow_runs(found: Learnt) -> dict[str, Any]:
    runs = found.mlflow.search_runs([(found.run.tracking or {})["experiment_id"]])
    return {run.info.run_name: run for run in runs}
