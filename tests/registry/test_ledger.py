"""The ledger: evaluations are computed once, and a stopped run is found again."""

from __future__ import annotations

import json

import pytest

from neft.errors import FailedError, InputError
from registry import Registry

EVALUATION = {
    "state_digest": "state",
    "data_digest": "data",
    "task": "sst2",
    "metric": "accuracy",
    "value": 0.8125,
    "examples": 16,
    "details": {"correct": 13},
}


@pytest.fixture
def registry(anywhere: Registry) -> Registry:
    """What is tested here holds on each database."""
    return anywhere


def test_an_evaluation_is_recorded_once(registry, place):
    recorded = registry.record_evaluation(**EVALUATION)
    assert registry.record_evaluation(**EVALUATION | {"value": 0.5}) == recorded
    assert recorded.value == 0.8125

    reopened = place.open()
    assert reopened.evaluation("state", "data") == recorded
    assert reopened.evaluation("state", "other") is None
    assert reopened.evaluation("other", "data") is None
    reopened.close()


def test_an_evaluation_of_another_state_is_another(registry):
    first = registry.record_evaluation(**EVALUATION)
    second = registry.record_evaluation(**EVALUATION | {"state_digest": "later", "value": 0.5})
    assert registry.evaluation("state", "data") == first
    assert registry.evaluation("later", "data") == second


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(registry, value):
    with pytest.raises(FailedError, match="accuracy of task 'sst2' is"):
        registry.record_evaluation(**EVALUATION | {"value": value})
    assert registry.evaluation("state", "data") is None


def start(registry, stream="demo", config_digest="config"):
    return registry.start_run(
        stream=stream, config_digest=config_digest, config={"seed": 1}, tasks=["sst2", "qnli"], tracking={"uri": "here"}
    )


def test_a_stopped_run_is_found_again_until_it_is_finished(registry):
    run = start(registry)
    assert (run.status, run.finished_at, run.tasks) == ("running", None, ["sst2", "qnli"])
    assert registry.unfinished_run("demo", "config") == run
    assert registry.unfinished_run("demo", "another config") is None
    assert registry.unfinished_run("another", "config") is None
    assert registry.finished_run("demo", "config") is None

    failed = registry.update_run(run.id, status="failed", error="the disk is full")
    assert failed.error == "the disk is full"
    assert failed.finished_at >= failed.started_at
    assert registry.unfinished_run("demo", "config") == failed

    resumed = registry.update_run(run.id, status="running", mlflow_run_id="mlflow")
    assert (resumed.error, resumed.finished_at) == (None, None)

    matrix = {"rows": [[0.5, None], [0.75, 0.5]]}
    registry.update_run(run.id, matrix=matrix)
    finished = registry.update_run(run.id, status="finished", metrics={"forgetting": 0.25})
    assert (finished.matrix, finished.metrics, finished.mlflow_run_id) == (matrix, {"forgetting": 0.25}, "mlflow")
    assert finished.tracking == {"uri": "here"}
    assert registry.finished_run("demo", "config") == finished
    assert registry.unfinished_run("demo", "config") is None
    assert json.loads(json.dumps(finished.to_dict()))["status"] == "finished"


def test_the_newest_run_and_the_streams(registry):
    with pytest.raises(InputError, match="nothing has been run yet"):
        registry.newest_run("demo")
    start(registry)
    newest = start(registry)
    start(registry, stream="another")

    assert registry.newest_run("demo") == newest
    assert [run.id for run in registry.runs("demo")] == [1, newest.id]
    assert registry.runs("unheard") == []
    assert registry.streams() == ["another", "demo"]
    with pytest.raises(InputError, match="did you mean 'demo'"):
        registry.newest_run("dmo")


def test_a_run_that_was_never_started(registry):
    with pytest.raises(InputError, match="no run 7"):
        registry.update_run(7, status="finished")
    run = start(registry)
    with pytest.raises(InputError, match="matrix cannot be recorded"):
        registry.update_run(run.id, matrix={"rows": [[float("nan")]]})
