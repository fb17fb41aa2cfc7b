"""The page of forgetting is made of its file, also of a partial one; its bars say reached, missed or not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import forgetting, transfer
from flows.results import Result

TASKS = ("a", "b", "c", "d")


def run(method: str, seed: int = 0, rate: float = 0.1, order: str = "first", **metrics: float) -> dict[str, Any]:
    """A run of four tasks, as the file holds it."""
    names = {"aa": forgetting.AA, "la": forgetting.LA, "bwt": forgetting.BWT}
    return {
        "method": method,
        "order": order,
        "seed": seed,
        "rate": rate,
        "tuning": order == "first" and seed == 0,
        "tasks": TASKS,
        "rows": [[0.5] * 4, *([[0.5 + 0.05 * number] * 4 for number in range(4)])],
        "majority": {},
        "metrics": {names.get(name, name.replace("__", "/")): value for name, value in metrics.items()},
        "params": {},
        "versions": {},
        "started": 0,
        "run_id": "",
        "config_digest": "",
    }


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    machine = {"command": "python", "processor": "p", "cores": 2, "versions": {"torch": "2"}}
    return {"comparisons": {"demo": list(runs)}, "machines": [machine]}


def bars(page: str) -> dict[str, tuple[str, str]]:
    """Figure -> what was measured, and whether the bar was reached."""
    rows = re.findall(r"^\| ([^|]+) \| at (?:least|most) [^|]+ \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    return {figure: (measured, state) for figure, measured, state in rows}


def test_bars_are_reached_missed_or_not_measured() -> None:
    page = forgetting.page(
        document(
            run("neft", aa=0.80, la=0.85, bwt=-0.01, perplexity_rise=0.05),
            run("neft", seed=1, aa=0.70, la=0.85, bwt=-0.01, perplexity_rise=0.05),
            run("lora", aa=0.70, la=0.86, bwt=-0.20),
            run("olora", aa=0.72),
            run("replay", seed=1, aa=0.80),
        )
    )
    found = bars(page)
    assert found["backward transfer without stored data, four tasks"] == ("-0.0100", "reached")
    assert found["its loss / sequential LoRA's"] == ("0.0500", "reached")
    assert found["learning accuracy - LoRA's best"] == ("-0.0100", "reached")
    # Paired: 0.80 - 0.72 of seed 0 alone, and 0.70 - 0.80 of seed 1.
    assert found["average accuracy - olora"] == ("0.0800", "reached")
    assert found["average accuracy - replay"] == ("-0.1000", "missed")
    assert found["rise of general perplexity"] == ("0.0500", "missed")
    assert found["average accuracy - joint"] == ("-", "not measured")
    assert found["backward transfer without stored data, ten tasks"] == ("-", "not measured")
    assert found["routing accuracy"] == ("-", "not measured")


def test_the_learning_rate_that_learns_best_is_the_one_shown() -> None:
    page = forgetting.page(
        document(
            run("neft", rate=0.1, la=0.6, aa=0.9, bwt=-0.9),
            run("neft", rate=0.3, la=0.8, aa=0.7, bwt=-0.3),
            run("neft", seed=1, rate=0.3, la=0.8, aa=0.5, bwt=-0.3),
        )
    )
    assert "| `neft` (2) | 0.3 | 0.600 ± 0.141 | 0.800 ± 0.000 | -0.300 ± 0.000 |" in page
    assert "`neft` 0.1: 0.600, 0.3: 0.800" in page


def test_an_oracle_that_forgets_anything_misses_its_bar() -> None:
    figure = "backward transfer, oracle, farthest from 0"
    runs = [run("neft", oracle__backward_transfer=value, seed=seed) for seed, value in enumerate((0.0, -0.001))]
    assert bars(forgetting.page(document(*runs)))[figure] == ("-0.0010", "missed")
    assert bars(forgetting.page(document(runs[0])))[figure] == ("0.0000", "reached")


def pair(task: str, related: bool, ratio: float | None) -> dict[str, Any]:
    return {"task": task, "related": related, "steps_ratio": ratio, "decision": {"start": "warm"}}


def test_bars_of_other_benchmarks_are_read_from_their_files(tmp_path: Path) -> None:
    transferred, time = "steps with transfer / without", "step time with functional / without"
    empty = bars(forgetting.page(document(run("neft", aa=0.5)), tmp_path))
    assert empty[transferred] == empty[time] == ("-", "not measured")
    pairs = [pair("a", True, 0.4), pair("b", True, 0.6), pair("c", False, 1.0)]
    (tmp_path / "transfer.json").write_text(json.dumps({"pairs": pairs}))
    ratio = {"median": 1.06, "low": 1.0, "high": 1.1, "count": 12}
    (tmp_path / "protection-smollm2-135m-cpu.json").write_text(json.dumps({"ratio": ratio}))
    page = forgetting.page(document(run("neft", aa=0.5)), tmp_path)
    assert bars(page)[transferred] == ("0.5000", "reached")
    assert bars(page)[time] == ("1.0600", "missed")
    assert "`a` 0.40 (warm), `b` 0.60 (warm), `c` 1.00 (warm, unrelated)" in page
    assert "of 12 rounds; quartiles 1.000 and 1.100" in page
    (tmp_path / "transfer.json").write_text(json.dumps({"pairs": [*pairs, pair("d", True, None)]}))
    assert bars(forgetting.page(document(run("neft", aa=0.5)), tmp_path))[transferred] == ("-", "not measured")


def test_the_ratio_is_of_the_first_steps_at_the_fresh_starts_last_loss() -> None:
    fresh = [(2, 0.9), (4, 0.5), (6, 0.6), (8, 0.5)]
    early = transfer.compared(fresh, [(2, 0.5), (4, 0.4)])
    assert (early["steps_ratio"], early["of_all_steps"]) == (0.5, 0.25)
    assert transfer.compared(fresh, fresh)["steps_ratio"] == 1.0
    assert transfer.compared(fresh, [(2, 0.7), (8, 0.6)])["steps_ratio"] is None


def test_runs_of_other_machines_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**document()["machines"][0], "cores": 64}
    kept = [run("neft", la=0.1), run("neft", seed=1, la=0.2), run("lora", la=0.3)]
    file = tmp_path / "forgetting.json"
    file.write_text(json.dumps({"comparisons": {"demo": kept, "else": [run("neft")]}, "machines": [other]}))
    # Learnt here under another config, and at a place that the file does not have.
    here = [run("neft", la=0.9) | {"config_digest": "other"}, run("neft", rate=0.3, la=0.8)]
    monkeypatch.setattr(forgetting, "FILE", file)
    monkeypatch.setattr(forgetting, "read_results", lambda name, uri: [Result.from_dict(each) for each in here])
    found = forgetting.collect(["demo"], "sqlite://")
    assert found["machines"][0] == other and len(found["machines"]) == 2
    results = forgetting.results_of(found)
    assert results["else"] == [Result.from_dict(run("neft"))]
    scores = {(each.method, each.seed, each.rate): each.metrics[forgetting.LA] for each in results["demo"]}
    assert scores == {("neft", 0, 0.1): 0.9, ("neft", 1, 0.1): 0.2, ("lora", 0, 0.1): 0.3, ("neft", 0, 0.3): 0.8}


def test_the_page_is_made_of_the_file() -> None:
    assert forgetting.PAGE.is_file() == forgetting.FILE.is_file()
    if forgetting.FILE.is_file():
        written = forgetting.PAGE.read_text(encoding="utf-8")
        assert written == forgetting.page(json.loads(forgetting.FILE.read_text())), "run `make docs`"
