"""A stream scored in three modes: one model for all, the named task's state, and the state a request is routed to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import measuring
from flows.config import load_config
from flows.report import as_json, modes_of
from flows.workbench import Workbench
from neft.errors import FailedError
from neft.evaluation import Score, evaluate
from neft.models import load_base
from neft.states import States
from neft.tasks import load_task
from registry import Entry
from tests.command import Neft
from tests.learnt import Learnt, learn
from tests.tiny import write_stream

MODES = "evaluation.modes=[consolidated, oracle, routed]"
#: The tasks of the tiny stream share their prompt and most words, so that a router is right but in seven of ten.
ASKED = 'tasks.1.prompt="Kind: {text} Text:"'
#: Without protection the second task overwrites the first one's neurons, so that the modes differ.
OVERRIDES = (MODES, ASKED, "method.protection=none")
TASKS = ("colours", "animals")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The third task's prompts are those of the first: no router could tell them apart.
    return write_stream(tmp_path_factory.mktemp("stream"), tasks=2)


@pytest.fixture(scope="module")
def scored(config: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Learnt:
    """The stream, learnt without disturbance."""
    return learn(config, tmp_path_factory.mktemp("home"), *OVERRIDES)


def test_the_oracle_forgets_nothing(scored: Learnt) -> None:
    matrix, oracle = scored.run.matrix["rows"], modes_of(scored.run)["oracle"].rows
    metrics = scored.run.metrics or {}
    assert oracle == (tuple(matrix[0]), (matrix[1][0], None), (matrix[1][0], matrix[2][1]))
    assert metrics["oracle/backward_transfer"] == metrics["oracle/forgetting"] == 0
    assert metrics["oracle/average_accuracy"] == pytest.approx(metrics["learning_accuracy"])
    assert metrics["backward_transfer"] < 0


def test_requests_are_sent_to_their_tasks(scored: Learnt) -> None:
    metrics = scored.run.metrics or {}
    assert metrics["routed/accuracy"] > 0.8  # a router that guesses is right in half of them
    assert metrics["routed/average_accuracy"] > metrics["average_accuracy"]
    assert metrics["routed/seconds_per_request"] > 0


def test_routed_scores_are_those_of_the_states_that_the_registry_s_router_names(scored: Learnt) -> None:
    parsed = load_config(scored.config, OVERRIDES)
    with scored.registry() as registry:
        last = registry.get("animals")
        base, tokenizer = load_base(str(scored.config.parent / "model"))
        router = registry.router(last)
        tasks = [load_task(spec, parsed.seed) for spec in parsed.tasks]
        sent = [router.route(base, tokenizer, task.eval) for task in tasks]
        assert (
            sum(signature.bytes for signature in router.signatures.values())
            == (scored.run.metrics or {})["routed/signature_bytes"]
        )
        states = registry.states(last, base)
        values: dict[str, list[Score]] = {}
        for name in states.names:
            states.visit(name)
            values[name] = [evaluate(base, tokenizer, task, parsed.evaluation_spec) for task in tasks]
    expected = []
    for place, names in enumerate(sent):
        kept = [values[name or last.reference][place].values[number] for number, name in enumerate(names)]
        expected.append(sum(kept) / len(kept))
    assert list(modes_of(scored.run)["routed"].rows[2]) == expected
    own = sum(names.count(f"{task}@1") for task, names in zip(TASKS, sent, strict=True))
    assert (scored.run.metrics or {})["routed/accuracy"] == own / 48


def test_mlflow_and_the_report_show_the_modes_side_by_side(
    scored: Learnt, neft: Neft, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = scored.mlflow.get_run(scored.run.mlflow_run_id)
    for name, value in (scored.run.metrics or {}).items():
        assert parent.data.metrics[name if "/" in name else f"continual/{name}"] == pytest.approx(value)
    table = json.loads(
        Path(scored.mlflow.download_artifacts(scored.run.mlflow_run_id, "r_matrix_oracle.json")).read_text()
    )
    assert table["data"][1][1:] == [pytest.approx(modes_of(scored.run)["oracle"].rows[1][0]), None]
    monkeypatch.setenv("NEFT_HOME", str(scored.home.path))
    monkeypatch.setenv("COLUMNS", "200")
    shown = neft("report", "tiny").out
    assert "tiny, oracle" in shown and "routed/accuracy" in shown
    described = as_json(scored.run)
    assert described["formulas"].keys() == described["metrics"].keys()
    assert described["modes"]["routed"] == [list(row) for row in modes_of(scored.run)["routed"].rows]


def test_a_stopped_stream_goes_on_to_the_same_scores(
    scored: Learnt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workbench.record

    def interrupted(self: Workbench) -> None:
        if self.work.task.name == "animals":
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Workbench, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(scored.config, tmp_path, *OVERRIDES)
    monkeypatch.undo()
    resumed = learn(scored.config, tmp_path, *OVERRIDES)
    assert resumed.run.matrix == scored.run.matrix
    assert _timeless(resumed) == _timeless(scored)


def _timeless(learnt: Learnt) -> dict[str, float]:
    return {name: value for name, value in (learnt.run.metrics or {}).items() if "seconds" not in name}


def test_a_state_that_scores_otherwise_when_it_is_checked_out_fails_the_run(
    config: Path, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., None] = measuring.prove

    def careless(states: States, entries: Any, measure: Callable[[Entry], list[float]]) -> None:
        real(states, entries, lambda entry: [1 - value for value in measure(entry)])

    monkeypatch.setattr(measuring, "prove", careless)
    with pytest.raises(FailedError, match=r"colours@1, checked out, scores .* when it was learnt"):
        learn(config, tmp_path, MODES, "training.max_steps=1")


def test_a_baseline_has_one_mode_alone(config: Path, tmp_path: Path, prefect_server: None) -> None:
    other = learn(config, tmp_path, MODES, "method.baseline=full", "training.max_steps=1")
    assert modes_of(other.run) == {}
    assert not any("/" in name for name in other.run.metrics or {})
