"""The page of forgetting is made of its file, also of a partial one; its bars say reached, missed or not measured."""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks import forgetting

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
    }


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    machine = {"command": "python", "processor": "p", "cores": 2, "versions": {"torch": "2"}}
    return {"comparisons": {"demo": list(runs)}, "machine": machine}


def bars(page: str) -> dict[str, tuple[str, str]]:
    """Figure -> what was measured, and whether the bar was reached."""
    rows = re.findall(r"^\| ([^|]+) \| at (?:least|most) [^|]+ \| ([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    return {figure: (measured, state) for figure, measured, state in rows}


def test_bars_are_reached_missed_or_not_measured() -> None:
    page = forgetting.page(
        document(
            run("neft", aa=0.80, la=0.85, bwt=-0.01, perplexity_rise=0.05, cost__training_seconds=21.0),
            run("neft", seed=1, aa=0.70, la=0.85, bwt=-0.01, perplexity_rise=0.05, cost__training_seconds=21.0),
            run("lora", aa=0.70, la=0.86, bwt=-0.20),
            run("olora", aa=0.72),
            run("replay", seed=1, aa=0.80),
            run("none", aa=0.5, cost__training_seconds=20.0),
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
    assert found["training seconds with protection / without"] == ("1.0500", "reached")
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


def test_the_page_is_made_of_the_file() -> None:
    assert forgetting.PAGE.is_file() == forgetting.FILE.is_file()
    if forgetting.FILE.is_file():
        written = forgetting.PAGE.read_text(encoding="utf-8")
        assert written == forgetting.page(json.loads(forgetting.FILE.read_text())), "run `make docs`"
