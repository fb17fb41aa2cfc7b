"""A stream learnt end to end, by a real Prefect flow, into a real MLflow store and a real registry."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mlflow.entities import ViewType

from flows import learning
from flows.home import Home
from flows.workbench import Workbench
from neft.audit import AuditResult, state_digest
from neft.errors import FailedError
from neft.evaluation import EvaluationSpec, evaluate
from neft.forgetting import AccuracyMatrix
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.tasks import load_task
from registry import Registry
from tests.learnt import Learnt, learn
from tests.tiny import TASKS, write_stream

NAMES = [name for name, _, _ in TASKS]
FEW_STEPS = "training.max_steps=4"


def test_every_task_is_learnt_above_its_majority_class(learnt: Learnt) -> None:
    matrix = AccuracyMatrix.from_dict(learnt.run.matrix or {})
    assert learnt.run.status == "finished"
    assert matrix.learnt == len(NAMES)
    for place in range(len(NAMES)):
        assert (matrix.rows[place + 1][place] or 0) >= 0.7  # the majority class scores 0.5


def test_metrics_are_those_of_the_matrix(learnt: Learnt) -> None:
    matrix = AccuracyMatrix.from_dict(learnt.run.matrix or {})
    metrics = dict(learnt.run.metrics or {})
    assert metrics.pop("general_delta") != 0
    assert metrics == pytest.approx(matrix.metrics())


def test_entries_form_a_chain_of_disjoint_sets(learnt: Learnt) -> None:
    with learnt.registry() as registry:
        entries = [registry.get(name) for name in NAMES]
        sets = [registry.neurons(entry) for entry in entries]
        assert [entry.parent for entry in entries] == [None, "colours@1", "animals@1"]
    for place, neurons in enumerate(sets):
        assert len(neurons) == 32
        for other in sets[:place]:
            assert len(neurons & other) == 0


def test_each_entry_says_how_it_was_made(learnt: Learnt) -> None:
    with learnt.registry() as registry:
        entry = registry.get("animals")
        scores = registry.scores(entry)
    assert entry.audit["identical"] is True
    assert entry.seed == 0
    assert entry.method["scorer"] == "taylor"
    assert entry.metrics["majority"] == 0.5
    assert entry.metrics["scores"]["animals"] == (learnt.run.matrix or {})["rows"][2][1]
    assert {"torch", "transformers", "peft", "python"} <= set(entry.versions)
    assert entry.mlflow_run_id and entry.prefect_flow_run_id
    assert scores is not None and scores.space.fingerprint == entry.space_fingerprint


def test_checkout_gives_back_every_past_state_bit_for_bit(learnt: Learnt) -> None:
    base, _ = load_base(str(learnt.config.parent / "model"))
    rebuilt = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with learnt.registry() as registry:
        for name in NAMES:
            entry = registry.get(name)
            for module, rows in registry.neurons(entry).rows().items():
                values, positions = registry.overlay(entry).values[module], torch.from_numpy(rows.positions.copy())
                weight = rebuilt[f"{module}.weight"]
                if rows.side == "row":
                    weight[positions] = values
                else:
                    weight[:, positions] = values.T
            model, _ = registry.checkout(name)
            assert state_digest(model) == entry.state_digest
            for key, tensor in model.state_dict().items():
                assert torch.equal(tensor, rebuilt[key]), key


def test_the_matrix_is_what_the_states_score_when_evaluated_again(learnt: Learnt) -> None:
    from flows.config import load_config

    config = load_config(learnt.config)
    spec = EvaluationSpec(batch_size=5, max_length=config.training.max_length)
    rows = (learnt.run.matrix or {})["rows"]
    with learnt.registry() as registry:
        model, tokenizer = registry.checkout("animals")
    scores = [evaluate(model, tokenizer, load_task(task, config.seed), spec).value for task in config.tasks]
    assert scores == rows[2]


def test_mlflow_has_the_matrix_over_tasks_learnt_on_the_parent(learnt: Learnt) -> None:
    client, run_id = learnt.mlflow, learnt.run.mlflow_run_id
    rows = (learnt.run.matrix or {})["rows"]
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    for place, name in enumerate(NAMES):
        history = {point.step: point.value for point in client.get_metric_history(run_id, f"accuracy/{name}")}
        assert history == {step: row[place] for step, row in enumerate(rows)}
    for metric, value in (learnt.run.metrics or {}).items():
        assert parent.data.metrics[f"continual/{metric}"] == pytest.approx(value)
    assert parent.data.params["method.scorer"] == "taylor"
    assert parent.data.tags["neft.seed"] == "0"
    assert parent.data.tags["neft.version.torch"].startswith("2.")
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"r_matrix.json", "r_matrix.png"} <= files
    table = json.loads(Path(client.download_artifacts(run_id, "r_matrix.json")).read_text())
    assert table["columns"] == ["state", *NAMES]
    for line, row in zip(table["data"], rows, strict=True):
        assert line[1:] == pytest.approx(row)  # MLflow writes ten digits


def test_mlflow_has_a_child_run_for_each_task(learnt: Learnt) -> None:
    client = learnt.mlflow
    children = client.search_runs(
        [client.get_run(learnt.run.mlflow_run_id).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{learnt.run.mlflow_run_id}'",
    )
    assert sorted(child.info.run_name for child in children) == sorted(NAMES)
    for child in children:
        assert child.info.status == "FINISHED"
        losses = client.get_metric_history(child.info.run_id, "train/loss")
        assert len(losses) == 8 and losses[-1].value < losses[0].value
        names = {entry.dataset.name for entry in child.inputs.dataset_inputs}
        assert names == {f"{child.info.run_name}/train", f"{child.info.run_name}/eval"}
        with learnt.registry() as registry:
            expected = registry.neurons(registry.get(child.data.tags["neft.entry"]))
        kept = NeuronSet.load(client.download_artifacts(child.info.run_id, "neurons.safetensors"))
        assert kept == expected


def test_mlflow_shows_how_free_capacity_shrinks(learnt: Learnt) -> None:
    with learnt.registry() as registry:
        entries = [registry.get(name) for name in NAMES]
    for entry, left in zip(entries, (96, 64, 32), strict=True):
        capacity, run_id = entry.metrics["capacity"], entry.mlflow_run_id or ""
        metrics = learnt.mlflow.get_run(run_id).data.metrics
        assert metrics["capacity/free"] == left == sum(after for _, after in capacity.values())
        assert metrics["capacity/fullest_site_free"] == left / 128  # every site gives as many
        table = json.loads(Path(learnt.mlflow.download_artifacts(run_id, "capacity.json")).read_text())
        assert table["columns"] == ["site", "size", "free before", "free after"]
        assert table["data"] == [[site, 64, *free] for site, free in capacity.items()]


def test_what_a_policy_keeps_and_the_signatures_are_counted_apart(learnt: Learnt) -> None:
    with learnt.registry() as registry:
        entries = [registry.get(name) for name in NAMES]
    costs = learnt.mlflow.get_run(learnt.run.mlflow_run_id).data.metrics
    assert costs["cost/memory_bytes_per_task"] == 0  # `exclude` keeps nothing
    signatures = sum(entry.signature_file.bytes for entry in entries if entry.signature_file)
    assert costs["cost/signature_bytes_per_task"] == pytest.approx(signatures / len(NAMES))
    assert signatures > 0


def test_run_again_learns_nothing_and_starts_no_run(learnt: Learnt, capsys: pytest.CaptureFixture[str]) -> None:
    again = learn(learnt.config, learnt.home.path)
    assert again.run.id == learnt.run.id
    assert "is learnt already" in capsys.readouterr().err


def test_a_longer_stream_learns_only_its_new_task(
    tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    short = learn(write_stream(tmp_path, tasks=2), tmp_path / "home", FEW_STEPS)
    capsys.readouterr()
    long = learn(write_stream(tmp_path, tasks=3), tmp_path / "home", FEW_STEPS)
    said = capsys.readouterr().err
    assert said.count("not learnt again") == 2
    assert said.count("trained 4 steps") == 1
    assert [row[:2] for row in (long.run.matrix or {})["rows"][:3]] == (short.run.matrix or {})["rows"]


def test_the_same_config_gives_the_same_weights(learnt: Learnt, tmp_path: Path) -> None:
    again = learn(learnt.config, tmp_path)
    with learnt.registry() as first, again.registry() as second:
        for name in NAMES:
            assert first.get(name).state_digest == second.get(name).state_digest
    other = learn(learnt.config, tmp_path, "seed=1")
    assert other.run.id != again.run.id
    with other.registry() as registry:
        assert registry.get("colours").version == 2
        assert registry.get("colours@1").state_digest != registry.get("colours@2").state_digest


def test_a_damaged_overlay_is_learnt_again_to_the_same_bytes(
    tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first = learn(write_stream(tmp_path, tasks=1), tmp_path / "home", FEW_STEPS)
    with first.registry() as registry:
        entry = registry.get("colours")
    file = next(first.home.registry.rglob(f"{entry.overlay_file.sha256}*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    capsys.readouterr()
    learn(write_stream(tmp_path, tasks=2), tmp_path / "home", FEW_STEPS)
    assert "learning it again" in capsys.readouterr().err
    assert file.read_bytes() == whole
    with first.registry() as registry:
        assert [entry.reference for entry in registry.list()] == ["colours@1", "animals@1"]
        assert state_digest(registry.checkout("animals")[0]) == registry.get("animals").state_digest


def test_two_runs_of_a_stream_at_once_are_refused(stream: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("registry").mkdir()
    with (
        FileLock(tmp_path / "registry" / ".tiny.lock"),
        pytest.raises(FailedError, match="another run of stream 'tiny'"),
    ):
        learn(stream, tmp_path)


def test_another_description_of_the_neurons_is_another_run(
    stream: Path, tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(stream, tmp_path, "training.max_steps=1")
    ungated = "model.neurons={ffn: [{up: mlp.up_proj, down: mlp.down_proj}]}"
    other = learn(stream, tmp_path, "training.max_steps=1", ungated)
    with other.registry() as registry:
        assert registry.get("colours").version == 2
    capsys.readouterr()


@pytest.mark.parametrize("baseline", ["full", "lora"])
def test_baselines_run_by_the_same_flow_and_record_no_entry(
    stream: Path, tmp_path: Path, prefect_server: None, baseline: str
) -> None:
    other = learn(stream, tmp_path, f"method.baseline={baseline}", "training.learning_rate=0.005")
    matrix = AccuracyMatrix.from_dict(other.run.matrix or {})
    assert matrix.learnt == len(NAMES)
    assert matrix.metrics()["learning_accuracy"] > 0.6
    with other.registry() as registry:
        assert list(registry.list()) == []


def test_a_failed_audit_fails_the_task_and_records_nothing_of_it(
    stream: Path, tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = learning.train

    def careless(model, tokenizer, task, *rest):  # stands in for `train`, whatever its types
        result = real(model, tokenizer, task, *rest)
        if task.name == "animals":
            with torch.no_grad():
                model.get_base_model().model.norm.weight[0] += 1e-3
        return result

    monkeypatch.setattr(learning, "train", careless)
    with pytest.raises(FailedError, match=r"failed its audit.*model\.norm\.weight"):
        learn(stream, tmp_path, FEW_STEPS)
    with closing(Registry.open(Home(tmp_path).registry)) as registry:
        assert [entry.reference for entry in registry.list()] == ["colours@1"]
        assert registry.newest_run("tiny").status == "failed"


def test_a_diverged_task_is_not_recorded_and_the_mended_stream_goes_on(
    stream: Path, tmp_path: Path, prefect_server: None
) -> None:
    with pytest.raises(FailedError, match=r"'colours': training diverged.*training\.learning_rate"):
        learn(stream, tmp_path, "training.learning_rate=1e30")
    with closing(Registry.open(Home(tmp_path).registry)) as registry:
        failed = registry.newest_run("tiny")
        assert failed.status == "failed" and "diverged" in (failed.error or "")
        assert list(registry.list()) == []
    client = Learnt(stream, Home(tmp_path), failed).mlflow
    assert {run.info.status for run in client.search_runs([failed.tracking["experiment_id"]])} == {"FAILED"}
    assert learn(stream, tmp_path, FEW_STEPS).run.status == "finished"


def test_too_small_a_capacity_says_how_much_is_free_and_what_to_do(
    stream: Path, tmp_path: Path, prefect_server: None
) -> None:
    with pytest.raises(FailedError, match=r"where 12 neurons are free \(of 64 .*lower method\.budget"):
        learn(stream, tmp_path, "method.budget=0.4")


def test_an_audit_result_of_a_good_task_counts_what_it_compared(learnt: Learnt) -> None:
    base, _ = load_base(str(learnt.config.parent / "model"))
    with learnt.registry() as registry:
        audit = AuditResult(**registry.get("colours").audit)
        parameters = registry.neurons(registry.get("colours")).parameters
    assert audit.parameters_outside == NeuronSpace.from_model(base).model_parameters - parameters


def test_an_interrupted_task_leaves_no_torn_run_behind(
    stream: Path, tmp_path: Path, learnt: Learnt, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workbench.record

    def interrupted(self: Workbench) -> None:
        if self.work.task.name == "places":
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Workbench, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(stream, tmp_path)
    monkeypatch.undo()
    resumed = learn(stream, tmp_path)
    assert resumed.run.id == 1
    assert resumed.run.matrix == learnt.run.matrix
    runs = resumed.mlflow.search_runs(
        [resumed.run.tracking["experiment_id"]],
        run_view_type=ViewType.ACTIVE_ONLY,
    )
    assert sorted(run.info.run_name for run in runs) == sorted(["tiny", *NAMES])
    assert {run.info.status for run in runs} == {"FINISHED"}
    history = resumed.mlflow.get_metric_history(resumed.run.mlflow_run_id, "accuracy/places")
    assert [point.step for point in history] == [0, 1, 2, 3]
