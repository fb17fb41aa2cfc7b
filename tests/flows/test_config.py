"""The config: read from YAML, changed by --set, and refused with every mistake named at once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import StreamConfig, load_config, validate_config
from neft.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
#: In place of a value: take the key out.
ABSENT = object()
PLAIN: dict[str, Any] = {
    "stream": "plain",
    "model": {"name": "some/model"},
    "tasks": [
        {
            "name": "first",
            "data": {"files": {"train": "train.jsonl", "eval": "eval.jsonl"}},
            "prompt": "{text}",
            "completion": " {label}",
            "labels": ["no", "yes"],
        },
        {"name": "second", "data": {"hub": "a/b"}, "prompt": "{text}", "completion": " {answer}"},
    ],
}


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """`PLAIN` with values put in place, such as ("tasks.0.name", "x"); `ABSENT` takes a key out."""
    raw = copy.deepcopy(PLAIN)
    for key, value in changes:
        *parents, last = key.split(".")
        place: Any = raw
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if value is ABSENT:
            del place[last]
        else:
            place[last] = value
    return raw


def complaints(*changes: tuple[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        validate_config(changed(*changes), "x.yaml")
    lines = str(caught.value).split("\n")
    assert all(line.startswith("x.yaml: ") for line in lines)
    return [line.removeprefix("x.yaml: ") for line in lines]


def written(folder: Path, raw: Any = None) -> Path:
    path = folder / "stream.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw or PLAIN), encoding="utf-8")
    return path


# Reading


def test_the_demo_is_read() -> None:
    config = load_config(CONFIGS / "demo.yaml")
    assert config.stream == "demo"
    assert [task.name for task in config.tasks] == ["film-sentiment", "bbc-topic", "tweet-sentiment", "plot-or-review"]
    assert config.tasks[0].labels == ("negative", "positive")
    assert config.method.budget.neurons == 0.1
    assert config.training.max_length == 128
    assert config.model.name == str((CONFIGS.parent / ".neft/demo/model").resolve())
    files = config.tasks[0].data.files
    assert files is not None
    assert files.train == (CONFIGS.parent / ".neft/demo/film-sentiment/train.jsonl").resolve()
    assert config.evaluation.general == ((CONFIGS.parent / ".neft/demo/general.txt").resolve(),)


def test_what_is_absent_has_a_default() -> None:
    config = validate_config(PLAIN, "x")
    assert (config.method.scorer, config.method.protection, config.method.kinds) == ("taylor", "exclude", ("ffn",))
    assert config.method.budget.neurons == 0.1
    assert config.method.baseline is None
    assert (config.seed, config.model.dtype) == (0, "float32")


def is_comparison(path: Path) -> bool:
    return "compare" in yaml.safe_load(path.read_text(encoding="utf-8"))


STREAMS = [path for path in sorted(CONFIGS.glob("*.yaml")) if not is_comparison(path)]


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_every_config_survives_json(path: Path) -> None:
    config = load_config(path)
    assert validate_config(config.model_dump(mode="json"), str(path)) == config


@pytest.mark.parametrize(
    "changes",
    [
        [("tasks.0.labels", {0: "no", 1: "yes"})],
        [("tasks.0.labels", {True: "yes", False: "no"})],
        [("tasks.0.prompt", [{"role": "user", "content": "{text}"}])],
        [("tasks.0.data.limit", {"train": 3})],
        [("tasks.0.data.files.train", ["a.csv", "b.csv"])],
        [("method.scorer", {"name": "similarity", "steps": 3}), ("method.baseline", "lora")],
        [("method.budget", {"parameters": 0.09}), ("method.selection", {"rule": "threshold", "threshold": 0.5})],
        [("model.neurons", {"ffn": [{"up": "a", "down": "b"}]}), ("registry.location", "r")],
    ],
    ids=lambda changes: changes[0][0],
)
def test_every_shape_of_value_survives_json(changes: list[tuple[str, Any]]) -> None:
    config = validate_config(changed(*changes), "x")
    assert config != validate_config(PLAIN, "x")
    assert validate_config(config.model_dump(mode="json"), "x") == config


def test_relative_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    raw = changed(
        ("model.name", "./model"),
        ("tasks.0.data.files", {"train": ["a.jsonl", "../b.jsonl"], "eval": "/data/eval.jsonl"}),
        ("evaluation.general", ["~/news.txt"]),
        ("registry.location", "kept"),
    )
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(written(tmp_path / "deep", raw).relative_to(tmp_path))
    files = config.tasks[0].data.files
    assert files is not None
    assert config.model.name == str(tmp_path / "deep" / "model")
    assert files.train == (tmp_path / "deep/a.jsonl", tmp_path / "b.jsonl")
    assert files.eval == Path("/data/eval.jsonl")
    assert config.evaluation.general == (tmp_path / "me/news.txt",)
    assert config.registry.location == tmp_path / "deep" / "kept"


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("some/model", False),
        ("gpt2", False),
        ("here", True),
        ("../here", True),
        ("weights.gguf", True),
        ("~/here", True),
    ],
)
def test_a_models_name_is_a_path_when_it_looks_like_one_or_the_folder_is_there(
    tmp_path: Path, name: str, local: bool
) -> None:
    (tmp_path / "here").mkdir()
    found = load_config(written(tmp_path, changed(("model.name", name)))).model.name
    assert Path(found).is_absolute() is local
    assert local or found == name


@pytest.mark.parametrize("key", ["scorer", "protection"])
def test_a_strategys_file_is_relative_to_the_config_and_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    choice = {"name": "keystone", "rho": 0.05, "prompts": "mine.yaml"}
    path = written(tmp_path / "deep", changed((f"method.{key}", choice)))
    with pytest.raises(InputError) as caught:
        load_config(path)
    gone = tmp_path / "deep" / "mine.yaml"
    assert str(caught.value) == (
        f"{path}: method.{key}: option 'prompts' of 'keystone': no such file: {gone}; give a YAML file of prompts"
    )
    gone.write_text("maths: '1 + 1 ='\ncode: 'def'\n")
    config = load_config(path)
    assert getattr(config.method, key) == choice | {"prompts": str(gone)}
    # The flow gets the config as JSON, in a process whose working directory may be another.
    monkeypatch.chdir("/")
    assert validate_config(config.model_dump(mode="json"), "x") == config


# --set


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["seed=7"], "seed", 7),
        (["training.max_steps=5"], "training.max_steps", 5),
        (["training.learning_rate=3e-4"], "training.learning_rate", 3e-4),
        (["tasks.1.name=other"], "tasks.1.name", "other"),
        (["tasks.0.data.limit.train=3"], "tasks.0.data.limit.train", 3),
        (["tasks.0.labels.0=never"], "tasks.0.labels.0", "never"),
        (["method.kinds=[ffn_in, ffn_out]"], "method.kinds", ("ffn_in", "ffn_out")),
        (["method.scorer={name: similarity, steps: 4}"], "method.scorer.steps", 4),
        (["method.baseline=null"], "method.baseline", None),
        (["tasks.0.prompt='a=b {text}'"], "tasks.0.prompt", "a=b {text}"),
        (["seed=7", "seed=8"], "seed", 8),
    ],
    ids=lambda each: each[-1] if isinstance(each, list) else "",
)
def test_set_changes_one_value(tmp_path: Path, overrides: Sequence[str], key: str, value: Any) -> None:
    found: Any = load_config(written(tmp_path), overrides)
    for part in key.split("."):
        if isinstance(found, dict):
            found = found[part]
        else:
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "not of the form key.subkey=value"),
        ("=3", "not of the form key.subkey=value"),
        ("sede=3", "unknown key 'sede'; did you mean 'seed'?"),
        ("training.max-steps=3", "unknown key 'training.max-steps'; did you mean 'max_steps'?"),
        ("seed=[1", "the value is not YAML"),
        ("seed=x", "seed: Input should be a valid integer"),
        ("tasks.2.name=x", "'2' is looked for in a list of 2 items"),
        ("tasks.2=x", "'2' is looked for in a list of 2 items"),
        ("tasks.first.name=x", "'first' is looked for in a list of 2 items; name a key, or an item by its number"),
        ("tasks.²=x", "'²' is looked for in a list"),
        ("stream.a=x", "'a' is looked for in no mapping"),
        ("stream.a.b=x", "'a' is looked for in no mapping"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(written(tmp_path), [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Mistakes


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("sed", "did you mean 'seed'?"),
        ("model.nam", "did you mean 'name'?"),
        ("model.neurons.fnn", "did you mean 'ffn'?"),
        ("tasks.0.promt", "did you mean 'prompt'?"),
        ("tasks.0.data.limits", "did you mean 'limit'?"),
        ("tasks.0.data.files.evals", "did you mean 'eval'?"),
        ("tasks.0.data.limit.trian", "did you mean 'train'?"),
        ("tasks.1.data.split.evals", "did you mean 'eval'?"),
        ("method.scorers", "did you mean 'scorer'?"),
        ("method.budget.neuron", "did you mean 'neurons'?"),
        ("method.selection.scop", "did you mean 'scope'?"),
        ("training.learning-rate", "did you mean 'learning_rate'?"),
        ("training.lr", "known: "),
        ("evaluation.batchsize", "did you mean 'batch_size'?"),
        ("tracking.ml_flow", "did you mean 'mlflow'?"),
        ("registry.zzz", "known: artifacts, location, url"),
    ],
)
def test_an_unknown_key_gets_the_nearest_known_one(key: str, hint: str) -> None:
    said = [line for line in complaints((key, 1)) if line.startswith(f"unknown key {key!r}; ")]
    assert len(said) == 1
    assert hint in said[0]


def test_an_unknown_key_of_a_message_or_a_block_gets_the_nearest_known_one() -> None:
    said = complaints(
        ("tasks.0.prompt", [{"role": "user", "content": "{text}", "contents": "x"}]),
        ("model.neurons", {"ffn": [{"up": "a", "down": "b", "gates": "c"}]}),
    )
    assert said == [
        "unknown key 'model.neurons.ffn.0.gates'; did you mean 'gate'?",
        "unknown key 'tasks.0.prompt.0.contents'; did you mean 'content'?",
    ]


def test_all_mistakes_are_said_at_once_each_with_its_place_and_value() -> None:
    said = complaints(
        ("sed", 1),
        ("seed", -1),
        ("model", ABSENT),
        ("tasks.0.labels", ["yes", "yes"]),
        ("tasks.1.completion", ABSENT),
        ("training.max_steps", 0),
        ("training.optim", "adam"),
        ("method.budget", 5.0),
        ("method.scorer", "tailor"),
        ("method.protection", "exclud"),
        ("method.baseline", {"name": "lora", "rank": 8}),
        ("evaluation.general", "news.txt"),
        ("registry", 3),
    )
    expected = [
        ("unknown key 'sed'", "'seed'"),
        ("seed: ", "greater than or equal to 0 (value -1)"),
        ("key 'model' is missing", "give it a value"),
        ("tasks.0.labels: ", "'yes' stands twice"),
        ("key 'tasks.1.completion' is missing", "give it a value"),
        ("training.max_steps: ", "greater than 0 (value 0)"),
        ("training.optim: ", "transformers has no 'adam'"),
        ("method.budget: ", "outside 0.01 to 0.5 (value 5.0)"),
        ("method.scorer: ", "unknown scorer 'tailor'; did you mean 'taylor'?"),
        ("method.protection: ", "unknown protection policy 'exclud'; did you mean 'exclude'?"),
        ("method.baseline: ", "baseline 'lora' has no option 'rank'"),
        ("evaluation.general: ", "must be a list (value 'news.txt')"),
        ("registry: ", "must be a mapping of keys to values (value 3)"),
    ]
    for start, words in expected:
        assert any(line.startswith(start) and words in line for line in said), (start, said)
    assert len(said) == len(expected)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([("tasks", [])], "tasks: "),
        ([("tasks.1.name", "first")], "tasks: two tasks are called 'first'; names in a stream must differ"),
        ([("tasks.0.prompt", "{text")], "tasks.0: template '{text' has a brace without its pair"),
        ([("tasks.0.data.hub", "a/b")], "tasks.0.data: give either `hub` or `files`"),
        ([("tasks.0.labels", [False, True])], "tasks.0.labels: label False is not text; put it in quotes"),
        ([("method.budget", True)], "method.budget: True is no budget"),
        ([("method.kinds", ["fnn"])], "method.kinds.0: "),
        ([("stream", "no spaces")], "stream: String should match pattern"),
        ([("seed", 2**32)], "seed: Input should be less than"),
        ([("model.dtype", "float64")], "model.dtype: "),
        ([("model.neurons", {"ffn": [{"up": "a"}]})], "key 'model.neurons.ffn.0.down' is missing; give it a value"),
        ([("method.scorer", {"name": ["taylor"]})], "method.scorer: unknown scorer ['taylor']"),
        (
            [("method.scorer", {"name": "keystone", "rho": 2})],
            "method.scorer: option 'rho' of 'keystone' is 2; it must",
        ),
        (
            [("method.protection", {"name": "keystone", "only": 1})],
            "method.protection: option 'only' of 'keystone' is 1",
        ),
    ],
)
def test_each_mistake_is_one_line(changes: list[tuple[str, Any]], line: str) -> None:
    (said,) = complaints(*changes)
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stream: [", "is not YAML"),
        ("", "is not a mapping of keys to values; start with `stream: NAME`"),
        ("- stream", "is not a mapping"),
        ("stream: \x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"stream\.yaml") as caught:
        load_config(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["gone.yaml", "."])
def test_a_config_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no such config: .*; give the path of a YAML file"):
        load_config(tmp_path / name)


def test_a_config_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stream.yaml").write_bytes("stream: ä".encode("latin-1"))
    with pytest.raises(InputError, match="is not YAML"):
        load_config(tmp_path / "stream.yaml")


def test_a_config_is_frozen() -> None:
    config = validate_config(PLAIN, "x")
    assert isinstance(config, StreamConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_evaluation_takes_trainings_length_where_it_names_none() -> None:
    assert validate_config(changed(("training.max_length", 77)), "x").evaluation_spec.max_length == 77
    both = changed(("training.max_length", 77), ("evaluation.max_length", 88), ("evaluation.batch_size", 3))
    assert validate_config(both, "x").evaluation_spec.max_length == 88
    assert validate_config(both, "x").evaluation_spec.batch_size == 3


@pytest.mark.parametrize("key", ["training.max_length", "evaluation.max_length"])
def test_a_length_beyond_the_models_positions_is_refused(key: str) -> None:
    config = validate_config(changed(("training.max_length", 60), (key, 65)), "x")
    with pytest.raises(InputError, match=rf"{key} is 65, but the model has 64 positions; lower it to that"):
        config.check_lengths(64)
    config.check_lengths(65)
    config.check_lengths(None)


@pytest.mark.parametrize("modes", [["oracle"], [], ["consolidated", "routed", "routed"]])
def test_the_newest_state_is_always_measured_and_no_mode_twice(modes: list[str]) -> None:
    [said] = complaints(("evaluation.modes", modes))
    assert said.startswith("evaluation.modes: name `consolidated`, which is always measured")
