"""A comparison learnt end to end in processes of its own, gone on with, and reported on from MLflow alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from flows import cell
from flows.comparison import load_comparison
from flows.config import load_config
from flows.home import Home
from flows.known import Known
from flows.results import chosen, read_results
from tests.command import Neft
from tests.learnt import Learnt
from tests.tiny import FILLERS, write_stream

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_comparison_is_learnt_once_and_reported_from_mlflow_alone(
    tmp_path: Path, home: Path, neft: Neft, prefect_server: None
) -> None:
    training = {"max_steps": 12, "learning_rate": 0.02, "max_length": 16, "per_device_train_batch_size": 8}
    write_stream(tmp_path, tasks=2, training=training)
    config = tmp_path / "compare.yaml"
    lora = {"method": {"baseline": {"name": "lora", "r": 4, "alpha": 8}}}
    # At a learning rate of 1e30 training diverges, which fails that cell alone.
    comparison = {"compare": "methods", "stream": "stream.yaml", "methods": {"neft": {}, "lora": lora}}
    config.write_text(yaml.safe_dump(comparison | {"seeds": [0, 1], "learning_rates": {"lora": [1e30, 0.005]}}))

    first = neft("compare", config, "--jobs", 2)
    assert first.code == 1
    assert first.err.count("methods.lora.own.0.1e30 failed: task 'colours': training diverged") == 1
    assert "4 runs learnt, 0 learnt before" in first.out
    assert "[5/5]" in first.err and "lora: learning rate 0.005 learnt best" in first.err
    assert "[0/" not in first.err

    none = neft("compare", config, "--limit", 0)
    assert "0 runs learnt, 3 learnt before, 2 left for another time" in none.out
    states = json.loads(neft("compare", config, "--dry-run", "--json").out)
    assert [each["state"] for each in states].count("learnt") == 3

    # On another machine, whose registry is empty, what a file keeps is not learnt again, unless its data change.
    shutil.rmtree(home / "registry")
    kept, results = tmp_path / "kept.json", read_results("methods", Home.find().mlflow_uri)
    kept.write_text(json.dumps({"comparisons": {"methods": [result.to_dict() for result in results]}}))
    listing = ("compare", config, "--dry-run", "--json", "--set", "learning_rates={lora: [0.005]}")
    alone, known = (
        [each["state"] for each in json.loads(neft(*listing, *more).out)] for more in ((), ("--known", kept))
    )
    assert alone == ["to learn"] * 4 and known == ["learnt"] * 4
    with (tmp_path / "colours-train.jsonl").open("a") as file:
        file.write((tmp_path / "colours-train.jsonl").read_text().splitlines()[0] + "\n")
    states = json.loads(neft(*listing, "--known", kept).out)
    assert [each["state"] for each in states] == ["to learn"] * 4

    # Two were learnt at once, so either may have begun first.
    found = json.loads(neft("compare", "--report", "methods", "--against", "neft", "--json").out)
    assert set(found["methods"]) == {"neft", "lora"}
    assert [run["seed"] for run in found["runs"]] == [0, 0, 1, 1]
    results = read_results("methods", Home.find().mlflow_uri)
    for method, runs in chosen(results).items():
        described = found["methods"][method]
        last = [sum(filter(None, run.rows[-1])) / 2 for run in runs]
        average = described["metrics"]["continual/average_accuracy"]
        assert average["count"] == 2
        assert average["mean"] == pytest.approx(sum(last) / 2, abs=1e-8)
        for name in ("cost/seconds", "cost/training_seconds", "cost/peak_memory_bytes"):
            assert described["metrics"][name]["mean"] > 0
        stored = described["metrics"]["cost/stored_bytes_per_task"]["mean"]
        assert (stored > 0) == (method == "neft")
    assert found["methods"]["lora"]["differences"]["continual/average_accuracy"]["count"] == 2

    shown = neft("compare", "--report", "methods", "--against", "lora", "--plot", tmp_path / "pictures")
    assert shown.code == 0 and "methods at their best learning rate" in shown.out
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {"r-matrix-neft.svg", "r-matrix-lora.svg", "average-accuracy.svg", "frontier.svg"}
    assert neft("compare", "--report", "metods").code == 2
    assert neft("compare", "--report", "methods", "--against", "lara").code == 2


def test_what_a_run_computes_is_told_from_its_config_as_the_run_tags_it(learnt: Learnt) -> None:
    run = learnt.mlflow.get_run(learnt.run.mlflow_run_id or "")
    assert Known({}).identity(load_config(learnt.config)) == run.data.tags["neft.config_digest"]


def _glue_rows(name: str, count: int) -> list[dict[str, object]]:
    """Rows in the columns of a GLUE task; the answer stands in the first word."""
    texts = {
        "cola": ["sentence"],
        "sst2": ["sentence"],
        "mrpc": ["sentence1", "sentence2"],
        "stsb": ["sentence1", "sentence2"],
        "qqp": ["question1", "question2"],
        "mnli": ["premise", "hypothesis"],
        "qnli": ["question", "sentence"],
        "rte": ["sentence1", "sentence2"],
    }[name]
    labels = 3 if name == "mnli" else 2
    rows: list[dict[str, object]] = []
    for number in range(count):
        answer = number % labels
        row: dict[str, object] = dict.fromkeys(texts, f"{FILLERS[answer]} {FILLERS[3 + number % 4]}")
        row |= {"score": answer / 2} if name == "stsb" else {"label": answer}
        rows.append(row)
    return rows


def test_the_glue_claim_runs_on_a_stand_in_of_every_task(
    tmp_path: Path, home: Path, neft: Neft, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stream(tmp_path, tasks=1)
    tasks = [task["name"] for task in yaml.safe_load((CONFIGS / "glue.yaml").read_text())["tasks"]]
    overrides = ["seeds=[0]", "learning_rates={}", "methods={full: {method: {baseline: full}}, neft: {}}"]
    overrides += [f"stream.model={{name: {tmp_path / 'model'}}}", "stream.evaluation={batch_size: 8}"]
    training = "{max_steps: 2, max_length: 64, per_device_train_batch_size: 4, learning_rate: 0.01}"
    overrides.append(f"stream.training={training}")
    for place, name in enumerate(tasks):
        for part, count in (("train", 12), ("eval", 6)):
            lines = [json.dumps(row) + "\n" for row in _glue_rows(name, count)]
            (tmp_path / f"{name}-{part}.jsonl").write_text("".join(lines))
        files = f"{{train: {tmp_path}/{name}-train.jsonl, eval: {tmp_path}/{name}-eval.jsonl}}"
        overrides.append(f"stream.tasks.{place}.data={{files: {files}}}")
    comparison = load_comparison(CONFIGS / "glue-claim.yaml", overrides)
    for each in comparison.first():
        paths = []
        for config in each.streams:
            path = tmp_path / f"{config.stream}.yaml"
            path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
            paths.append(str(path))
        # What the cell's process does, in this one: eight tasks would be long to start sixteen times.
        monkeypatch.setattr(sys, "argv", ["cell", *paths])
        assert cell.main() == 0
    found = json.loads(neft("compare", "--report", "glue-claim", "--json").out)
    assert [run["tasks"] for run in found["runs"]] == [[name] for name in tasks] * 2
    assert found["runs"][0]["majority"] == {"cola": 0.5}
    assert found["runs"][tasks.index("stsb")]["majority"] == {}
    assert found["methods"]["full"]["shares"]["plain"]["mean"] == 1.0
    assert found["methods"]["neft"]["metrics"]["continual/average_accuracy"]["count"] == 8
    shown = neft("compare", "--report", "glue-claim")
    assert "share above the majority class" in shown.out
