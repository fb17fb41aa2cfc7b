"""Keystones inspected: random controls, the ablation's rows, what is shown, and the command from end to end."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from flows.config import load_config
from flows.figures import ablation
from flows.inspection import Ablated, inspect_keystones, random_neurons, search_of
from neft.errors import InputError
from neft.evaluation import evaluate, load_probes, perplexity
from neft.keystone import KeystoneSearch
from neft.models import load_base
from neft.neurons import NeuronSpace
from neft.tasks import load_task
from tests.command import Neft
from tests.tiny import KEYSTONE_PROMPTS, tiny_model, write_stream

ROOT = Path(__file__).parents[2]
#: Of 64 neurons a site, and three capabilities.
OPTIONS = {"rho": 0.3, "new_tokens": 5}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    path.write_text(yaml.safe_dump(KEYSTONE_PROMPTS, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def stream_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("inspected"), tasks=2)


# In parts


def test_random_neurons_are_even_repeatable_and_nested() -> None:
    space = NeuronSpace.from_model(tiny_model(), ("ffn", "attention"))
    sets = [random_neurons(space, count, seed=3) for count in (0, 1, 20, len(space))]
    assert [len(neurons) for neurons in sets] == [0, 1, 20, len(space)]
    for smaller, larger in pairwise(sets):
        assert not smaller - larger
    assert random_neurons(space, 20, seed=3) == sets[2]
    assert random_neurons(space, 20, seed=4) != sets[2]
    counts = torch.zeros(len(space.sites))
    for seed in range(200):
        drawn = random_neurons(space, 20, seed)
        counts += torch.tensor([len(drawn[site.name]) for site in space.sites])
    shares = torch.tensor([site.size for site in space.sites]) / len(space)
    torch.testing.assert_close(counts / counts.sum(), shares, atol=0.02, rtol=0)


def test_the_search_is_the_configs_protection_then_its_scorer_then_the_default(
    stream_file: Path, prompts: Path
) -> None:
    def search(*overrides: str) -> KeystoneSearch:
        return search_of(load_config(stream_file, overrides))

    by_scorer = f"method.scorer={{name: keystone, rho: 0.2, prompts: {prompts}}}"
    assert search() == KeystoneSearch()
    assert search(by_scorer) == KeystoneSearch(rho=0.2, prompts=prompts)
    assert search(by_scorer, "method.protection={name: keystone, rho: 0.1, only: true}") == KeystoneSearch(rho=0.1)
    given = search_of(load_config(stream_file, [by_scorer]), rho=0.4, new_tokens=7)
    assert given == KeystoneSearch(rho=0.4, prompts=prompts, new_tokens=7)
    with pytest.raises(InputError, match="option 'rho' of 'keystone' is 0"):
        search_of(load_config(stream_file), rho=0)


def test_each_row_is_what_the_model_scores_without_those_neurons(stream_file: Path, prompts: Path) -> None:
    config = load_config(stream_file)
    found = inspect_keystones(config, KeystoneSearch(prompts=prompts, **OPTIONS), [4, 2, 0, 2], examples=100)
    assert [(row.count, row.which) for row in found.ablation] == [
        (0, "none"),
        (2, "keystone"),
        (2, "random"),
        (4, "keystone"),
        (4, "random"),
    ]
    assert found.examples == {"colours": 24, "animals": 24}
    (probe,) = load_probes(config.evaluation)
    for row in found.ablation:
        model, tokenizer = load_base(config.model.name)
        sets = {"none": [], "keystone": found.keystones.top(row.count)}
        sets["random"] = random_neurons(found.keystones.space, row.count, config.seed)
        with torch.no_grad():
            for site, index in sets[row.which]:
                layer = int(site.split(".")[2])
                model.model.layers[layer].mlp.down_proj.weight[:, index] = 0
        assert row.perplexity["general"] == pytest.approx(perplexity(model, tokenizer, probe), rel=1e-5)
        for spec in config.tasks:
            task = load_task(spec, config.seed)
            assert row.scores[task.name] == evaluate(model, tokenizer, task, config.evaluation_spec).value
    assert len({row.perplexity["general"] for row in found.ablation}) == 5


def test_the_default_counts_grow_by_four_up_to_all(stream_file: Path, prompts: Path) -> None:
    found = inspect_keystones(load_config(stream_file), KeystoneSearch(prompts=prompts, **OPTIONS), examples=2)
    whole = len(found.keystones.neurons)
    counts = [row.count for row in found.ablation if row.which == "keystone"]
    assert counts == [*(each for each in (1, 4, 16, 64) if each < whole), whole]
    assert set(found.examples.values()) == {2}


def test_the_picture_shows_every_row() -> None:
    rows = [
        Ablated(0, "none", {"news": 10.0}, {"a": 0.9, "b": 0.8}),
        Ablated(4, "keystone", {"news": 1000.0}, {"a": 0.1, "b": 0.2}),
        Ablated(4, "random", {"news": 11.0}, {"a": 0.85, "b": 0.75}),
    ]
    first, second = ablation(rows, "title").axes
    lines = {line.get_label(): list(line.get_ydata()) for line in (*first.lines, *second.lines)}
    assert lines == {
        "news, keystone": [10, 1000],
        "news, random": [10, 11],
        "a, keystone": [0.9, 0.1],
        "a, random": [0.9, 0.85],
        "b, keystone": [0.8, 0.2],
        "b, random": [0.8, 0.75],
    }
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["0", "4"]
    without_probe = [Ablated(row.count, row.which, {}, row.scores) for row in rows]
    assert len(ablation(without_probe, "title").axes) == 1


def test_the_guide_shows_the_recorded_figures() -> None:
    """And none but those: the page's tables are written from the JSON that it names."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "keystone.json").read_text())
    page = (ROOT / "docs" / "guides" / "find-keystone-neurons.md").read_text()
    assert f"has {kept['keystones']} keystones among {kept['neurons']:,} feed-forward neurons" in page
    for row in kept["ablation"]:
        cells = [f"{row['perplexity']['general']:.1f}", *(f"{score:.2f}" for score in row["scores"].values())]
        assert f"| {row['silenced']} | {row['which']} | {' | '.join(cells)} |" in page
    capabilities = list(kept["prompts"])
    shared = {frozenset(row["capabilities"]): f"{row['intersection_over_union']:.2f}" for row in kept["overlaps"]}
    for first in capabilities:
        cells = [shared.get(frozenset((first, second)), "") for second in capabilities]
        assert f"| {first} | {' | '.join(cells)} |" in page
    rows = [line for line in page.splitlines() if line.startswith(("| 0 ", "| 1 ", "| 4 ", "| 16 ", "| 64 ", "| 96 "))]
    assert len(rows) == len(kept["ablation"])


# The command


def test_inspect_from_end_to_end(stream_file: Path, prompts: Path, tmp_path: Path, neft: Neft) -> None:
    arguments = (stream_file, "--prompts", prompts, "--rho", 0.3, "--new-tokens", 5, "--examples", 5, "--top", "1,3")
    described = json.loads(neft("inspect", "keystone", *arguments, "--json").out)
    assert described["prompts"] == KEYSTONE_PROMPTS
    assert (described["rho"], described["new_tokens"], described["neurons"]) == (0.3, 5, 128)
    assert described["keystones"] == len(described["ranking"]) == sum(described["sites"].values()) > 3
    strengths = [row["strength"] for row in described["ranking"]]
    assert strengths == sorted(strengths, reverse=True)
    assert [row["capabilities"] for row in described["overlaps"]] == [
        ["colours", "animals"],
        ["colours", "fillers"],
        ["animals", "fillers"],
    ]
    assert [row["silenced"] for row in described["ablation"]] == [0, 1, 1, 3, 3]
    assert described["examples"] == {"colours": 5, "animals": 5}
    assert "torch" in described["versions"]
    assert str(stream_file.parent) not in json.dumps(described)

    shown = neft("inspect", "keystone", *arguments, "--plot", tmp_path / "new" / "plot.svg")
    assert shown.code == 0
    assert f"{described['keystones']} of 128 neurons" in shown.out
    for row in described["ablation"]:
        assert f"{row['perplexity']['general']:,.1f}" in shown.out
        assert all(f"{score:.3f}" in shown.out for score in row["scores"].values())
    for row in described["overlaps"]:
        assert f"{row['intersection_over_union']:.2f}" in shown.out
    assert "Look further:" in shown.out and "--set method.protection=keystone" in shown.out
    assert "3 random neurons silenced" in shown.err
    assert (tmp_path / "new" / "plot.svg").read_text().lstrip().startswith("<?xml")


def test_a_model_without_keystones_is_said(stream_file: Path, prompts: Path, neft: Neft) -> None:
    outcome = neft(
        "inspect", "keystone", stream_file, "--prompts", prompts, "--rho", 0.001, "--new-tokens", 5, "--examples", 2
    )
    assert outcome.code == 0
    assert "0 of 128 neurons" in outcome.out
    assert "There is nothing to silence: raise --rho" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--top", "4,x"), "--top '4,x' is no list of numbers"),
        (("--top", ""), "--top '' is no list of numbers"),
        (("--top", "100", "--new-tokens", "3"), "--top 100: there are"),
        (("--plot", "plot.pdf"), "--plot plot.pdf ends in '.pdf'"),
        (("--rho", "1.5"), "option 'rho' of 'keystone' is 1.5"),
        (("--prompts", "gone.yaml"), "no such file: gone.yaml"),
        (("--set", "training.max_length=65"), "training.max_length is 65, but the model has 64 positions"),
    ],
)
def test_a_mistake_is_one_sentence(stream_file: Path, neft: Neft, arguments: tuple[str, ...], words: str) -> None:
    outcome = neft("inspect", "keystone", stream_file, *arguments)
    assert outcome.code == 2, outcome.err
    assert words in outcome.err
    assert sum(line.startswith("neft: ") for line in outcome.err.splitlines()) == 1
    assert outcome.out == ""
