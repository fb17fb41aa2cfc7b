"""Tasks: what files of every format become, and what is said when they cannot."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from neft.errors import InputError, NeftError
from neft.tasks import Example, Task, TaskSpec, load_task, template_fields

Rows = list[dict[str, Any]]

ROWS: Rows = [
    {"text": "the red cat", "kind": "warm"},
    {"text": 'one, "quoted" {dog}', "kind": "cold"},
    {"text": "NA", "kind": "warm"},
    {"text": "007", "kind": "cold"},
    {"text": "2020-01-01", "kind": "warm"},
    {"text": "zwei\nZeilen, äöü", "kind": "cold"},
]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def spec(folder: Path, file: str = "rows.jsonl", /, **changes: Any) -> TaskSpec:
    """A classification of `ROWS` from one file; `changes` replace keys, None removes them."""
    keys: dict[str, Any] = {
        "name": "task",
        "data": {"files": {"train": folder / file, "eval": folder / file}},
        "prompt": "Text: {text}\nKind:",
        "completion": " {kind}",
        "labels": ["warm", "cold"],
    }
    return TaskSpec.model_validate({key: value for key, value in (keys | changes).items() if value is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def numbered(folder: Path, count: int = 50) -> Path:
    write_jsonl(folder / "many.jsonl", [{"text": f"row {number}", "kind": "warm"} for number in range(count)])
    return folder


# What becomes of rows


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_text_as_written(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"rows.{ending}", ROWS)
    task = load_task(spec(tmp_path, f"rows.{ending}"))
    assert task.train == task.eval
    assert [(example.prompt, example.completion) for example in task.train] == [
        (f"Text: {row['text']}\nKind:", f" {row['kind']}") for row in ROWS
    ]
    assert task.completions == (" warm", " cold")
    assert task.metric == "accuracy"


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.{ending}"
    WRITERS[ending](path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_task(spec(tmp_path, f"rows.{ending}")).train) == len(ROWS)


def test_a_csv_cell_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    long = "word " * 40_000
    write_csv(tmp_path / "rows.csv", [{"text": long, "kind": "warm"}])
    assert load_task(spec(tmp_path, "rows.csv")).train[0].prompt == f"Text: {long}\nKind:"


def test_several_files_of_any_format_are_read_in_order(folder: Path) -> None:
    write_csv(folder / "more.csv", [{"text": "last", "kind": "cold"}])
    files = {"train": [folder / "rows.jsonl", folder / "more.csv"], "eval": folder / "rows.jsonl"}
    task = load_task(spec(folder, data={"files": files}))
    assert len(task.train) == len(ROWS) + 1
    assert task.train[-1] == Example("Text: last\nKind:", " cold")


def test_a_changed_file_is_read_anew_whatever_its_time_stamp(folder: Path) -> None:
    path, before = folder / "rows.jsonl", load_task(spec(folder))
    stamp = path.stat()
    write_jsonl(path, [{"text": "something else", "kind": "cold"}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = load_task(spec(folder))
    assert after.train == (Example("Text: something else\nKind:", " cold"),)
    assert after.train_fingerprint != before.train_fingerprint


def test_braces_and_odd_column_names_are_rendered_as_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"0": "zero", "two words": "{0}", "kind": "warm"}])
    task = load_task(spec(tmp_path, prompt="{{{0}}} {two words}"))
    assert task.train[0].prompt == "{zero} {0}"


def test_chat_prompts_become_messages(folder: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{text}?"}]
    prompt = load_task(spec(folder, prompt=turns)).train[0].prompt
    assert prompt == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "the red cat?"})


@pytest.mark.parametrize(
    ("labels", "value", "text"),
    [
        (["warm", "cold"], "cold", "cold"),
        (["warm", "cold"], 1, "cold"),
        (["warm", "cold"], "1", "cold"),
        (["1", "2"], 1, "1"),
        (["1", "2"], "2", "2"),
        ({0: "warm", 1: "cold"}, 1, "cold"),
        ({0: "warm", 1: "cold"}, "1", "cold"),
        ({"w": "warm", "c": "cold", "k": "cold"}, "k", "cold"),
        ({True: "warm", False: "cold"}, False, "cold"),
    ],
)
def test_a_columns_value_becomes_its_label(tmp_path: Path, labels: Any, value: Any, text: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "kind": value}])
    assert load_task(spec(tmp_path, labels=labels)).train[0].completion == f" {text}"


def test_labels_of_a_mapping_that_repeat_are_one_choice(folder: Path) -> None:
    labels = {"warm": "yes", "cold": "no", "hot": "yes"}
    assert load_task(spec(folder, labels=labels)).completions == (" yes", " no")


def test_without_labels_the_task_is_generation(folder: Path) -> None:
    task = load_task(spec(folder, labels=None, max_new_tokens=5))
    assert (task.metric, task.completions, task.majority, task.max_new_tokens) == ("exact_match", (), None, 5)
    assert load_task(spec(folder, labels=None, metric="rouge_l")).metric == "rouge_l"


def test_majority_is_the_score_of_the_commonest_label(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "x", "kind": kind} for kind in ("warm", "cold", "cold", "cold")])
    assert load_task(spec(tmp_path)).majority == 0.75


# Sampling


def test_limit_samples_by_the_seed_alone(tmp_path: Path) -> None:
    numbered(tmp_path)
    data = {"files": {"train": tmp_path / "many.jsonl", "eval": tmp_path / "many.jsonl"}, "limit": 10}
    first, again, other = (load_task(spec(tmp_path, data=data), seed).train for seed in (3, 3, 4))
    assert first == again != other
    assert len(set(first)) == 10


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [({"train": 7}, (7, 50)), ({"eval": 3}, (50, 3)), ({"train": 7, "eval": 3}, (7, 3)), (99, (50, 50))],
)
def test_limit_of_each_part(tmp_path: Path, limit: Any, sizes: tuple[int, int]) -> None:
    numbered(tmp_path)
    files = {"train": tmp_path / "many.jsonl", "eval": tmp_path / "many.jsonl"}
    task = load_task(spec(tmp_path, data={"files": files, "limit": limit}))
    assert (len(task.train), len(task.eval)) == sizes


def test_without_need_of_sampling_rows_keep_their_order(tmp_path: Path) -> None:
    numbered(tmp_path)
    files = {"train": tmp_path / "many.jsonl", "eval": tmp_path / "many.jsonl"}
    task = load_task(spec(tmp_path, data={"files": files, "limit": 50}))
    assert [example.prompt for example in task.train] == [f"Text: row {number}\nKind:" for number in range(50)]


# Fingerprints


def test_fingerprints_do_not_depend_on_the_file(folder: Path) -> None:
    plain = load_task(spec(folder))
    write_parquet(folder / "other.parquet", [row | {"unused": 1} for row in ROWS])
    other = load_task(spec(folder, "other.parquet", name="renamed"))
    assert (plain.train_fingerprint, plain.eval_fingerprint) == (other.train_fingerprint, other.eval_fingerprint)


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "Text: {text}\nKind :"}, {"completion": "{kind}"}, {"labels": {"warm": "warm", "cold": "cool"}}],
    ids=["prompt", "completion", "label"],
)
def test_fingerprints_change_with_what_the_model_sees(folder: Path, changes: dict[str, Any]) -> None:
    plain, changed = load_task(spec(folder)), load_task(spec(folder, **changes))
    assert plain.train_fingerprint != changed.train_fingerprint
    assert plain.eval_fingerprint != changed.eval_fingerprint


def test_fingerprints_change_with_rows_and_their_order() -> None:
    first, second = Example("a", " b"), Example("c", " d")
    prints = {
        Task("task", rows, rows, "exact_match").train_fingerprint
        for rows in ((first, second), (second, first), (first,), (first, first), (Example("a b", ""), second))
    }
    assert len(prints) == 5


def test_how_answers_are_judged_changes_the_evaluation_alone(folder: Path) -> None:
    generation = [
        load_task(spec(folder, labels=None, **changes))
        for changes in ({}, {"max_new_tokens": 3}, {"metric": "rouge_l"})
    ]
    assert len({task.eval_fingerprint for task in generation}) == 3
    assert len({task.train_fingerprint for task in generation}) == 1
    more = load_task(spec(folder, labels=["warm", "cold", "mild"]))
    plain = load_task(spec(folder))
    assert more.train_fingerprint == plain.train_fingerprint
    assert more.eval_fingerprint != plain.eval_fingerprint
    assert load_task(spec(folder, max_new_tokens=3)).eval_fingerprint == plain.eval_fingerprint


# Bad input

BROKEN_FILES = {
    "empty.jsonl": (b"", ["is empty", "at least one row"]),
    "blank.jsonl": (b"\n \n", ["no rows", "at least one"]),
    "header.csv": (b"text,kind\n", ["no rows", "at least one"]),
    "cut.jsonl": (b'{"text": "a", "kind": "warm"}\n{"text": ', ["line 2 is not JSON", "repair"]),
    "list.jsonl": (b'["a", "warm"]\n', ["line 1 is not an object"]),
    "cut.json": (b'[{"text": "a"', ["cannot be read as json", "repair"]),
    "latin.jsonl": ('{"text": "ä", "kind": "warm"}'.encode("latin-1"), ["utf-8", "repair"]),
    "quote.csv": (b'text,kind\n"a,warm\n', ["cannot be read as csv", "repair"]),
    "long.csv": (b"text,kind\na,warm,more\n", ["line 2 has 3 cells under a header of 2"]),
    "twice.csv": (b"text,text\na,b\n", ["header names 'text' twice"]),
    "short.parquet": (b"PAR1", ["cannot be read as parquet", "repair"]),
    "rows.txt": (b"text\n", ["ends in '.txt'", ".jsonl, .json, .csv, .parquet"]),
    "missing.jsonl": (b'{"text": null, "kind": "warm"}', ["row 1", "column 'text' has no value", "fill it in or drop"]),
    "missing.csv": (b"text,kind\na,warm\nb,\n", ["row 2", "column 'kind' has no value", "fill it in or drop"]),
    "label.jsonl": (
        b'{"text": "a", "kind": "hot"}',
        ["row 1", "'kind'", "'hot' is not one of the labels (warm, cold)"],
    ),
    "index.jsonl": (b'{"text": "a", "kind": -1}', ["-1 is not one of the labels", "add it to `labels` or drop it"]),
    "bool.jsonl": (b'{"text": "a", "kind": true}', ["True is not one of the labels"]),
    "column.jsonl": (b'{"txt": "a", "kind": "warm"}', ["prompt names {text}, which is no column; did you mean 'txt'?"]),
    "completion.jsonl": (b'{"text": "a"}', ["completion names {kind}, which is no column"]),
}


def assert_one_clear_sentence(message: str, *words: str) -> None:
    for word in words:
        assert word in message
    assert "\n" not in message


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named_with_what_is_wrong_and_what_to_do(tmp_path: Path, name: str) -> None:
    content, words = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_task(spec(tmp_path, name))
    assert_one_clear_sentence(str(caught.value), "'task'", name, "train", *words)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train": "rows.jsonl", "eval": "gone.jsonl"}, ["data.files.eval", "no such file", "gone.jsonl"]),
        ({"train": [], "eval": "rows.jsonl"}, ["data.files.train", "empty list"]),
        ({"train": ".", "eval": "rows.jsonl"}, ["data.files.train", "known endings"]),
    ],
)
def test_files_that_are_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError) as caught:
        load_task(spec(folder, data={"files": files}))
    assert_one_clear_sentence(str(caught.value), *words)


FILES = {"train": "a.jsonl", "eval": "b.jsonl"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"hub": "x/y", "files": FILES}}, "either `hub` or `files`"),
        ({"data": {}}, "either `hub` or `files`"),
        ({"data": {"files": FILES, "split": {"train": "a"}}}, "belong to `hub`"),
        ({"data": {"files": FILES, "limit": 0}}, "`limit` is 0"),
        ({"labels": ["warm", "warm", "cold"]}, "'warm' stands twice"),
        ({"labels": {1: "warm", "1": "cold"}}, "'1' stands twice"),
        ({"labels": ["warm"]}, "at least two"),
        ({"labels": {"a": "warm", "b": "warm"}}, "at least two"),
        ({"labels": [False, True]}, "label False is not text; put it in quotes"),
        ({"labels": {"a": 1, "b": 2}}, "label 1 is not text; put it in quotes"),
        ({"prompt": "Text: {text"}, "brace without its pair"),
        ({"prompt": "Text: {}"}, "plain column name"),
        ({"prompt": "Text: {text!r}"}, "plain column name"),
        ({"prompt": "Text: {text.upper}"}, "plain column name"),
        ({"prompt": [{"role": "user", "content": "} {text}"}]}, "brace without its pair"),
        ({"completion": " warm"}, "nothing to learn"),
        ({"completion": " {kind} {text}"}, "exactly one column"),
        ({"labels": None, "metric": "accuracy"}, "needs `labels`"),
        ({"metric": "rouge_l"}, "is for generation"),
        ({"name": "no spaces"}, "should match pattern"),
    ],
)
def test_a_contradictory_spec_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(tmp_path, **changes)
    assert words in str(caught.value)


def test_template_fields_are_the_columns_in_order() -> None:
    assert template_fields("{b} {{a}} {a} {b} {two words}") == ("b", "a", "two words")


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(NeftError) as caught:
        load_task(spec(tmp_path, data={"hub": "nobody/nothing"}))
    assert_one_clear_sentence(str(caught.value), "'task'", "data.hub 'nobody/nothing'")
