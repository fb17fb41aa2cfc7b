"""Every config in configs/ is well-formed, and each stream has the tasks and the order that its name promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from neft.tasks import TaskSpec, template_fields

CONFIGS = Path(__file__).parents[1] / "configs"

# shared/research.md, section 4, and the papers that it names.
ORDERS = {
    "demo": "film-sentiment bbc-topic tweet-sentiment plot-or-review",
    "demo-ten": "film-sentiment bbc-topic tweet-sentiment plot-or-review film-verdict business-or-politics "
    "tweet-unhappy tweet-question text-source headline-or-story",
    "standard-cl-order1": "dbpedia amazon yahoo agnews",
    "standard-cl-order2": "dbpedia amazon agnews yahoo",
    "standard-cl-order3": "yahoo amazon agnews dbpedia",
    "long-order4": "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
    "long-order5": "multirc boolq wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
    "long-order6": "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic",
    "trace": "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten",
    "glue": "cola sst2 mrpc stsb qqp mnli qnli rte",
}
COMPARISONS = {
    "forgetting-demo": "demo",
    "forgetting-demo-more": "demo",
    "forgetting-ten": "demo-ten",
    "glue-claim": "glue",
}
TOP_KEYS = {"stream", "model", "tasks", "method", "training", "evaluation", "seed"}


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def specs(name: str) -> list[TaskSpec]:
    return [TaskSpec.model_validate(item) for item in load(name)["tasks"]]


def test_no_config_is_left_out() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*ORDERS, *COMPARISONS}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_runs_its_streams_tasks_with_three_seeds_and_tunes_every_method(name: str) -> None:
    raw, stream = load(name), COMPARISONS[name]
    assert (raw["compare"], raw["stream"]) == (name, f"{stream}.yaml")
    assert len(raw["seeds"]) >= 3
    assert set(raw["learning_rates"]) == set(raw["methods"])
    for order in raw.get("orders", {}).values():
        assert sorted(order) == sorted(ORDERS[stream].split())


@pytest.mark.parametrize("name", ORDERS)
def test_tasks_are_valid_and_in_the_published_order(name: str) -> None:
    names = [spec.name for spec in specs(name)]
    assert names == ORDERS[name].split()
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ORDERS)
def test_top_level(name: str) -> None:
    config = load(name)
    assert set(config) == TOP_KEYS
    assert config["stream"] == name


@pytest.mark.parametrize("name", ORDERS)
def test_prompts_do_not_end_in_the_space_that_completions_begin_with(name: str) -> None:
    for spec in specs(name):
        if isinstance(spec.prompt, str):
            assert not spec.prompt.endswith(" ")
            assert spec.completion.startswith(" ")
            assert not set(template_fields(spec.prompt)) & set(template_fields(spec.completion))


@pytest.mark.parametrize("name", ORDERS)
def test_excluded_budgets_leave_room_for_every_task(name: str) -> None:
    method = load(name)["method"]
    assert method["protection"] in ("exclude", "functional")
    assert method["budget"] * len(specs(name)) <= 1


@pytest.mark.parametrize("family", ["standard-cl-order", "long-order"])
def test_a_task_is_the_same_in_every_order(family: str) -> None:
    first, *others = [{spec.name: spec for spec in specs(name)} for name in sorted(ORDERS) if name.startswith(family)]
    assert all(other == first for other in others)


def test_the_ten_tasks_begin_with_the_demos_own() -> None:
    assert specs("demo-ten")[:4] == specs("demo")
    assert load("demo-ten")["training"] == load("demo")["training"]


def test_hub_tasks_evaluate_on_labelled_rows() -> None:
    """GLUE's and SuperGLUE's test splits have -1 for every label."""
    for name in ORDERS:
        for spec in specs(name):
            if spec.data.hub in ("nyu-mll/glue", "aps/super_glue"):
                assert spec.data.split.eval.startswith("validation")
