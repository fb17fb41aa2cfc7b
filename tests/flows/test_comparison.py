"""A comparison's config, its cells and their order, the choice of a learning rate, and what is done already."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.comparison import Cell, Comparison, load_comparison
from flows.known import Known
from flows.results import Result
from flows.tuning import Ledger, best, choose, states
from neft.errors import InputError
from registry import Registry
from tests.command import Neft
from tests.tiny import write_stream

METHODS: dict[str, Any] = {"neft": {}, "lora": {"method": {"baseline": {"name": "lora", "r": 4, "alpha": 8}}}}


def write(folder: Path, **changes: Any) -> Path:
    """A comparison of two methods on the tiny stream of two tasks."""
    write_stream(folder, tasks=2)
    config: dict[str, Any] = {"compare": "tiny-methods", "stream": "stream.yaml", "methods": METHODS} | changes
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


CONFIGS = Path(__file__).parents[2] / "configs"
WRITTEN = [path for path in sorted(CONFIGS.glob("*.yaml")) if "\ncompare:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_every_comparison_of_the_configs_is_read(path: Path) -> None:
    comparison = load_comparison(path)
    assert comparison.name == path.stem
    assert {cell.method for cell in comparison.first()} == comparison.spec.methods.keys()


ORDERS = {"first": ["colours", "animals"], "second": ["animals", "colours"]}

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "task of an order": ({"orders": {"first": ["colors"]}}, r"orders\.first names task 'colors'.*'colours'"),
    "task twice": ({"orders": {"first": ["colours", "colours"]}}, "names task 'colours' twice"),
    "empty order": ({"orders": {"first": []}}, r"orders\.first is empty"),
    "key of a method": (
        {"methods": {"a": {"method": {"budgt": 1}}}},
        r"method 'a': unknown key 'method\.budgt'.*budget",
    ),
    "strategy of a method": ({"methods": {"a": {"method": {"baseline": "lara"}}}}, "unknown baseline 'lara'"),
    "no methods": ({"methods": {}}, "`methods` is empty"),
    "name of a method": ({"methods": {"a.b": {}}}, "'a.b' is no name"),
    "no seeds": ({"seeds": []}, "seeds: .*at least 1"),
    "seed twice": ({"seeds": [1, 1]}, "seed 1 stands twice"),
    "negative seed": ({"seeds": [-1]}, "seeds.0: .*greater than or equal to 0"),
    "rates of no method": ({"learning_rates": {"lra": [0.1]}}, "names method 'lra'.*'lora'"),
    "no rates": ({"learning_rates": {"lora": []}}, "must be different numbers above 0"),
    "separate with orders": ({"separate": True, "orders": ORDERS}, "give one of them|leave one of them out"),
    "unknown key": ({"sedes": [1]}, "unknown key 'sedes'.*'seeds'"),
    "no stream": ({"stream": "gone.yaml"}, "no such config: .*gone.yaml"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_clear_sentence(case: str, tmp_path: Path) -> None:
    changes, message = MISTAKES[case]
    with pytest.raises(InputError, match=message) as caught:
        load_comparison(write(tmp_path, **changes))
    assert len(str(caught.value).splitlines()) == 1


def names(cells: list[Cell]) -> list[str]:
    return [cell.name.removeprefix("tiny-methods.") for cell in cells]


def test_cells_come_with_every_rate_first_then_by_order_seed_and_method(tmp_path: Path) -> None:
    path = write(tmp_path, orders=ORDERS, seeds=[3, 1], learning_rates={"lora": [1e-4, 0.005]})
    comparison = load_comparison(path)
    assert names(comparison.first()) == ["neft.first.3.0.02", "lora.first.3.0.0001", "lora.first.3.0.005"]
    assert names(comparison.rest({"neft": 0.02, "lora": 0.005})) == [
        "neft.first.1.0.02",
        "lora.first.1.0.005",
        "neft.second.3.0.02",
        "lora.second.3.0.005",
        "neft.second.1.0.02",
        "lora.second.1.0.005",
    ]
    assert comparison.unknown({"neft": 0.02}) == ["lora.first.1", "lora.second.3", "lora.second.1"]


def test_a_cell_is_the_methods_stream_in_its_order_with_its_seed_and_rate(tmp_path: Path) -> None:
    comparison = load_comparison(write(tmp_path, orders=ORDERS, seeds=[0, 1]))
    (config,) = comparison.cell("lora", "second", 1, 1e30).streams
    assert config.stream == "tiny-methods.lora.second.1.1e30"
    assert [task.name for task in config.tasks] == ["animals", "colours"]
    assert (config.seed, config.training.learning_rate) == (1, 1e30)
    assert config.method.baseline == {"name": "lora", "r": 4, "alpha": 8}
    assert config.tracking.experiment == "tiny-methods"
    assert config.tracking.tags == {
        "neft.compare": "tiny-methods",
        "neft.method": "lora",
        "neft.order": "second",
        "neft.learning_rate": "1e+30",
        "neft.tuning": "false",
    }
    assert comparison.cell("neft", "first", 0, 0.1).streams[0].tracking.tags["neft.tuning"] == "true"
    assert comparison.cell("neft", "first", 0, 0.1).streams[0].method.baseline is None


def test_what_a_method_does_not_change_stays_and_its_strategy_is_replaced_as_a_whole(tmp_path: Path) -> None:
    stream = yaml.safe_load(write_stream(tmp_path, tasks=1).read_text())
    stream["method"] = {"budget": 0.25, "scorer": {"name": "keystone", "rho": 0.5}}
    methods = {"a": {"method": {"scorer": {"name": "random"}}}, "b": {"training": {"max_steps": 3}}}
    comparison = load_comparison(write(tmp_path, stream=stream, methods=methods), ["stream.training.max_length=12"])
    changed, kept = (comparison.cell(name, "own", 0, 0.1).streams[0] for name in methods)
    assert changed.method.scorer == {"name": "random"}
    assert changed.method.budget == kept.method.budget
    assert kept.method.scorer == {"name": "keystone", "rho": 0.5}
    assert (kept.training.max_steps, kept.training.max_length) == (3, 12)


def test_separate_tasks_are_streams_of_one_task_in_one_cell(tmp_path: Path) -> None:
    cells = load_comparison(write(tmp_path, separate=True, seeds=[0, 1])).first()
    assert names(cells) == ["neft.alone.0.0.02", "lora.alone.0.0.02"]
    assert [config.stream for config in cells[0].streams] == [
        "tiny-methods.neft.colours.0.0.02",
        "tiny-methods.neft.animals.0.0.02",
    ]
    assert [[task.name for task in config.tasks] for config in cells[0].streams] == [["colours"], ["animals"]]


def test_the_best_rate_is_the_smallest_of_those_that_learn_best() -> None:
    assert best({0.1: 0.5, 0.3: 0.9, 1.0: 0.7}) == 0.3
    assert best({1.0: 0.9, 0.3: 0.9, 0.1: 0.8}) == 0.3


@pytest.fixture
def tried(tmp_path: Path, home: Path) -> Iterator[tuple[Comparison, Ledger, Registry]]:
    """A comparison with two rates for one of its methods, and a registry to write their runs to."""
    comparison = load_comparison(write(tmp_path, seeds=[0, 1], learning_rates={"lora": [0.005, 0.1]}))
    with closing(Registry.open(home / "registry")) as registry, closing(Ledger(comparison)) as ledger:
        yield comparison, ledger, registry


def record(registry: Registry, cell: Cell, **metrics: float) -> None:
    """A finished run of each of the cell's streams, with these metrics."""
    for config in cell.streams:
        described = config.model_dump(mode="json")
        run = registry.start_run(stream=config.stream, config_digest="", config=described, tasks=[])
        registry.update_run(run.id, status="finished", metrics=metrics)


def test_a_rate_is_chosen_when_all_are_tried(tried: tuple[Comparison, Ledger, Registry]) -> None:
    comparison, ledger, registry = tried
    low, high = comparison.first()[1:]
    assert choose(comparison, ledger) == {"neft": 0.02}
    record(registry, low, learning_accuracy=0.6, average_accuracy=0.9)
    assert choose(comparison, ledger) == {"neft": 0.02}
    # One that failed is out, and the others are all there is.
    assert choose(comparison, ledger, [high.name]) == {"neft": 0.02, "lora": 0.005}
    # A method that has no learning accuracy goes by its average accuracy.
    record(registry, high, average_accuracy=0.7)
    assert choose(comparison, ledger) == {"neft": 0.02, "lora": 0.1}


def test_a_cell_is_learnt_while_its_config_and_its_files_are_the_same(
    tried: tuple[Comparison, Ledger, Registry], tmp_path: Path
) -> None:
    comparison, ledger, registry = tried
    cell = comparison.first()[0]
    assert not ledger.learnt(cell)
    record(registry, cell, learning_accuracy=0.6)
    assert ledger.learnt(cell)
    assert dict(states(comparison)) == {
        "tiny-methods.neft.own.0.0.02": "learnt",
        "tiny-methods.lora.own.0.0.005": "to learn",
        "tiny-methods.lora.own.0.0.1": "to learn",
        "tiny-methods.neft.own.1.0.02": "to learn",
        "tiny-methods.lora.own.1": "waits for tuning",
    }
    (config,) = cell.streams
    other = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 7})})
    assert not ledger.learnt(replace(cell, streams=(other,)))
    later = (tmp_path / "colours-train.jsonl").stat().st_mtime + 3600
    os.utime(tmp_path / "colours-train.jsonl", (later, later))
    assert not ledger.learnt(cell)


def learnt_elsewhere(cell: Cell, digest: str, **metrics: float) -> Result:
    return Result(
        cell.method,
        cell.order,
        cell.seed,
        cell.rate,
        tuning=True,
        tasks=("colours", "animals"),
        rows=(),
        majority={},
        metrics={f"continual/{name}": value for name, value in metrics.items()},
        params={},
        versions={},
        started=0,
        run_id="",
        config_digest=digest,
    )


def test_a_rate_is_chosen_of_what_was_learnt_here_and_elsewhere(
    tried: tuple[Comparison, Ledger, Registry], tmp_path: Path
) -> None:
    comparison, _, registry = tried
    low, high = comparison.first()[1:]
    record(registry, high, learning_accuracy=0.7)
    digest = Known({}).identity(low.streams[0])
    assert digest != Known({}).identity(high.streams[0])
    file = tmp_path / "kept.json"
    result = learnt_elsewhere(low, digest, learning_accuracy=0.9)
    file.write_text(json.dumps({"comparisons": {"tiny-methods": [result.to_dict()]}}))
    known = Known.read(file, "tiny-methods")
    with closing(Ledger(comparison, known)) as ledger:
        assert ledger.learnt(low) and ledger.learnt(high) and not ledger.learnt(comparison.first()[0])
        assert choose(comparison, ledger) == {"neft": 0.02, "lora": 0.005}
    with closing(Ledger(comparison, Known.read(file, "another"))) as ledger:
        assert not ledger.learnt(low)


KEPT = {"none": None, "no JSON": "{", "no comparisons": "{}", "no run": '{"comparisons": {"a": [{"seed": 0}]}}'}


@pytest.mark.parametrize("case", KEPT)
def test_a_file_that_keeps_no_results_is_named(case: str, tmp_path: Path) -> None:
    path, text = tmp_path / "kept.json", KEPT[case]
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(path))):
        Known.read(path, "a")


def test_a_dry_run_lists_and_learns_nothing(tmp_path: Path, home: Path, neft: Neft) -> None:
    outcome = neft("compare", write(tmp_path), "--dry-run")
    assert outcome.code == 0
    assert re.findall(r"(tiny-methods\S+) +│ to learn", outcome.out) == [
        "tiny-methods.neft.own.0.0.02",
        "tiny-methods.lora.own.0.0.02",
    ]
    assert not (home / "compare").exists()


def test_a_config_or_a_report_is_asked_for(home: Path, neft: Neft) -> None:
    outcome = neft("compare")
    assert outcome.code == 2
    assert "--report EXPERIMENT" in outcome.err
