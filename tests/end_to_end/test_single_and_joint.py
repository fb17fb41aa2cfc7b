"""Streams that are not learnt task after task: a model for each task, and all tasks at once."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.courses import Single
from flows.report import as_json, as_table
from neft.audit import state_digest
from neft.forgetting import AccuracyMatrix
from neft.models import load_base
from tests.learnt import Learnt, learn
from tests.tiny import write_stream


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of the tiny stream."""
    return write_stream(tmp_path_factory.mktemp("short"), tasks=2)


def children(learnt: Learnt) -> list[tuple[str, str | None, str]]:
    """Name, audit and status of each child run, the newest last."""
    runs = learnt.mlflow.search_runs([learnt.run.tracking["experiment_id"]], order_by=["attributes.start_time ASC"])
    return [
        (run.info.run_name, run.data.tags.get("neft.audit.identical"), run.info.status)
        for run in runs
        if "mlflow.parentRunId" in run.data.tags
    ]


def printed(learnt: Learnt) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as captured:
        console.print(as_table([learnt.run]))
    return captured.get()


def test_single_learns_each_task_from_the_base_model(
    short: Path, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = load_base(str(short.parent / "model"))
    started: list[str] = []
    real = Single.begin

    def watched(self: Single, model) -> None:  # whatever model the bench has
        real(self, model)
        started.append(state_digest(model))

    monkeypatch.setattr(Single, "begin", watched)
    learnt = learn(short, tmp_path, "method.baseline={name: single, by: {name: lora, r: 8}}")
    assert started == [state_digest(base)] * 2
    matrix = AccuracyMatrix.from_dict(learnt.run.matrix or {})
    untouched, first, last = matrix.rows
    assert None not in untouched
    assert first[1] is None and first[0] == last[0] and None not in last
    metrics = as_json(learnt.run)["metrics"]
    assert metrics["backward_transfer"] == metrics["forgetting"] == 0
    assert metrics["learning_accuracy"] == metrics["average_accuracy"] > 0.6
    assert "forward_transfer" not in metrics and "general_delta" not in metrics
    assert children(learnt) == [("colours", "true", "FINISHED"), ("animals", "true", "FINISHED")]
    history = learnt.mlflow.get_metric_history(learnt.run.mlflow_run_id, "accuracy/animals")
    assert [point.step for point in history] == [0, 2]
    assert " - " in printed(learnt)


def test_joint_learns_all_tasks_at_once(
    short: Path, tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    learnt = learn(short, tmp_path, "method.baseline={name: joint, by: ffn}", "training.learning_rate=0.01")
    untouched, first, last = AccuracyMatrix.from_dict(learnt.run.matrix or {}).rows
    assert None not in untouched and first == (None, None)
    assert min(score or 0.0 for score in last) > 0.6
    assert as_json(learnt.run)["metrics"].keys() == {"average_accuracy", "average_accuracy_micro", "general_delta"}
    assert children(learnt) == [("all tasks", "true", "FINISHED")]
    said = capsys.readouterr()
    assert "[1/1] all tasks: trained 80 steps" in said.out + said.err
    history = learnt.mlflow.get_metric_history(learnt.run.mlflow_run_id, "accuracy/animals")
    assert [point.step for point in history] == [0, 2]
    assert " - " in printed(learnt)
