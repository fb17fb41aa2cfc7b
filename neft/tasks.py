"""A task: its data, prompt, completion, labels and metric; from a config's words to rendered examples."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from neft.errors import FailedError, InputError, nearest
from neft.rows import READERS, Row, columns_of, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

Metric = Literal["accuracy", "exact_match", "rouge_l"]
Part = Literal["train", "eval"]


class Rows(Protocol):
    """Rows by number: a list of them, or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Row: ...


class Spec(BaseModel):
    """Base of every part of a config: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PerPart(Spec):
    """A number of rows for each part of the data."""

    train: int | None = Field(None, gt=0, description="rows to train on; all when absent")
    eval: int | None = Field(None, gt=0, description="rows to evaluate on; all when absent")


class Files(Spec):
    """Data files: JSONL, CSV or Parquet, one or several for each part."""

    train: Path | tuple[Path, ...] = Field(description="file or files to train on")
    eval: Path | tuple[Path, ...] = Field(description="file or files to evaluate on")


class Split(Spec):
    """Names of a hub data set's splits, slices included (`train[:90%]`)."""

    train: str = Field("train", description="split to train on")
    eval: str = Field("test", description="split to evaluate on")


class DataSpec(Spec):
    """Where a task's rows come from: a hub data set, or files."""

    hub: str | None = Field(None, description="id of a data set on the hub")
    config: str | None = Field(None, description="configuration (subset) of the hub data set")
    split: Split | None = Field(None, description="which splits of the hub data set to use; default: `train`, `test`")
    files: Files | None = Field(None, description="data files, instead of a hub data set")
    limit: int | PerPart | None = Field(None, description="rows to sample, with the stream's seed, from each part")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hub is None) == (self.files is None):
            raise ValueError("give either `hub` or `files`")
        if self.files and (self.config or self.split):
            raise ValueError("`config` and `split` belong to `hub`, not to `files`")
        if isinstance(self.limit, int) and self.limit < 1:
            raise ValueError(f"`limit` is {self.limit}; it must be at least 1")
        return self

    def limit_of(self, part: Part) -> int | None:
        if isinstance(self.limit, PerPart):
            return getattr(self.limit, part)
        return self.limit


class Message(Spec):
    """One turn of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(description="template of the turn's text")


class TaskSpec(Spec):
    """One task as a config describes it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name, unique in its stream")]
    data: DataSpec = Field(description="where the rows come from")
    prompt: str | tuple[Message, ...] = Field(
        description="template with `{column}` fields; a list of messages goes through the model's chat template"
    )
    completion: str = Field(description="template of what the model is to write, with `{column}` fields")
    labels: tuple[str, ...] | dict[str, str] | None = Field(
        None,
        description="for classification: the label texts (a list, indexed by integer columns), or column value: text",
    )
    metric: Metric | None = Field(None, description="`accuracy` with labels; else `exact_match` (default) or `rouge_l`")
    max_new_tokens: int = Field(64, gt=0, description="longest generated answer, for `exact_match` and `rouge_l`")

    @field_validator("labels", mode="before")
    @classmethod
    def _plain_labels(cls, labels: Any) -> Any:
        """Column values as text, so that a mapping reads JSON, CSV and YAML alike (YAML makes `yes` a boolean)."""
        if not isinstance(labels, Mapping | list | tuple):
            return labels
        values = [str(value) for value in labels]
        for text in labels.values() if isinstance(labels, Mapping) else labels:
            if not isinstance(text, str):
                raise ValueError(f"label {text!r} is not text; put it in quotes")
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value!r} stands twice; name each label once")
        return dict(zip(values, labels.values(), strict=True)) if isinstance(labels, Mapping) else labels

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for _, template in _templates(self):
            template_fields(template)
        if not template_fields(self.completion):
            raise ValueError("`completion` names no column, so there is nothing to learn")
        if self.labels is not None and len(template_fields(self.completion)) != 1:
            raise ValueError("with `labels`, `completion` must name exactly one column: the label's")
        if self.labels is not None and len(set(self.label_texts)) < 2:
            raise ValueError("`labels` needs at least two different texts")
        if self.metric == "accuracy" and self.labels is None:
            raise ValueError("`metric: accuracy` needs `labels`")
        if self.labels is not None and self.metric not in (None, "accuracy"):
            raise ValueError(f"`metric: {self.metric}` is for generation; with `labels` it is `accuracy`")
        return self

    @property
    def label_texts(self) -> tuple[str, ...]:
        texts = self.labels.values() if isinstance(self.labels, dict) else self.labels or ()
        return tuple(dict.fromkeys(texts))

    @property
    def metric_name(self) -> Metric:
        return self.metric or ("accuracy" if self.labels is not None else "exact_match")


@dataclass(frozen=True)
class Example:
    """One rendered row. `prompt` is text, or chat messages as transformers take them."""

    prompt: str | tuple[Mapping[str, str], ...]
    completion: str


@dataclass(frozen=True)
class Task:
    """A task ready to be learnt: rendered examples, and the completions to choose from when it is a classification."""

    name: str
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    metric: Metric
    completions: tuple[str, ...] = ()
    max_new_tokens: int = 64
    train_fingerprint: str = field(init=False)
    eval_fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_fingerprint", _fingerprint(self.train, ""))
        about = f"{self.metric}\0{self.completions or self.max_new_tokens}"
        object.__setattr__(self, "eval_fingerprint", _fingerprint(self.eval, about))

    @property
    def majority(self) -> float | None:
        """Score of always answering the commonest label of the evaluation rows; None for generation."""
        if not self.completions:
            return None
        answers = [example.completion for example in self.eval]
        return max(answers.count(text) for text in self.completions) / len(answers)


def _fingerprint(examples: Iterable[Example], about: str) -> str:
    """SHA-256 of rendered examples, in order: what the model is shown, whatever file it came from."""
    digest = hashlib.sha256(about.encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completion], sort_keys=True).encode())
    return digest.hexdigest()


def load_task(spec: TaskSpec, seed: int = 0) -> Task:
    """Read, sample and render a task's data.

    Raises:
        InputError: a missing or empty file, a template field that is no column, a value outside the labels.
        FailedError: a hub data set that cannot be fetched.
    """
    train, evaluation = (_examples(spec, part, seed) for part in ("train", "eval"))
    candidates = tuple(_render_completion(spec, text) for text in spec.label_texts)
    return Task(spec.name, train, evaluation, spec.metric_name, candidates, spec.max_new_tokens)


def _examples(spec: TaskSpec, part: Part, seed: int) -> tuple[Example, ...]:
    source, columns, rows = _rows(spec, part)
    where = f"task {spec.name!r}, {part} data {source}"
    if len(rows) == 0:
        raise InputError(f"{where}: there are no rows; give a file or split with at least one")
    _check_columns(spec, columns, where)
    return tuple(
        _render(spec, rows[number], f"{where}, row {number + 1}")
        for number in _sample(len(rows), spec.data.limit_of(part), seed)
    )


def _sample(count: int, limit: int | None, seed: int) -> list[int]:
    """Which rows to take, counted from 0: all in order, or `limit` of them drawn by the seed."""
    if limit is None or limit >= count:
        return list(range(count))
    order: list[int] = np.random.default_rng(seed).permutation(count)[:limit].tolist()
    return order


def _rows(spec: TaskSpec, part: Part) -> tuple[str, Sequence[str], Rows]:
    """What to call the source, its columns, and its rows."""
    if spec.data.files is not None:
        given = getattr(spec.data.files, part)
        paths = (given,) if isinstance(given, Path) else given
        rows = _read_files(f"task {spec.name!r}: data.files.{part}", paths)
        return ", ".join(str(path) for path in paths), columns_of(rows), rows
    dataset = _read_hub(spec, part)
    return f"{spec.data.hub}[{getattr(spec.data.split or Split(), part)}]", dataset.column_names, dataset


def _read_files(where: str, paths: Sequence[Path]) -> list[Row]:
    if not paths:
        raise InputError(f"{where} is an empty list; name at least one file")
    rows: list[Row] = []
    for path in paths:
        if path.suffix.lower() not in READERS:
            raise InputError(f"{where} {str(path)!r} ends in {path.suffix!r}; known endings: {', '.join(READERS)}")
        if not path.is_file():
            raise InputError(f"{where}: no such file: {path}; check the path, which is relative to the config")
        if path.stat().st_size == 0:
            raise InputError(f"{where} {path} is empty; give a file with at least one row")
        try:
            rows += read_rows(path)
        except (ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{where} {path} cannot be read as {path.suffix.lstrip('.')}: {reason}; repair the file"
            ) from error
    return rows


def _read_hub(spec: TaskSpec, part: Part) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    split = getattr(spec.data.split or Split(), part)
    try:
        return load_dataset(spec.data.hub, spec.data.config, split=split)
    except (DatasetsError, ValueError, RuntimeError) as error:
        raise InputError(
            f"task {spec.name!r}: data.hub {spec.data.hub!r} (config {spec.data.config!r}, split {split!r}) "
            f"cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    except OSError as error:
        raise FailedError(
            f"task {spec.name!r}: data.hub {spec.data.hub!r} cannot be fetched: {error}; check the network, or give "
            "the data as files"
        ) from error


def template_fields(template: str) -> tuple[str, ...]:
    """Columns that a template names, in order.

    Raises:
        ValueError: the template is malformed, or a field is more than a column's name.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template {template!r} has a brace without its pair; write {{{{ or }}}} for a brace"
        ) from error
    fields = []
    for _, name, spec, conversion in pieces:
        if name is None:
            continue
        if not name or spec or conversion or not all(character not in ".[]" for character in name):
            raise ValueError(f"template field {{{name}}} must be a plain column name; write {{{{ or }}}} for a brace")
        fields.append(name)
    return tuple(dict.fromkeys(fields))


def _fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with each field's value in its place, whatever the column is called (`str.format` refuses `{0}`)."""
    pieces = string.Formatter().parse(template)
    return "".join(text + ("" if name is None else str(row[name])) for text, name, _, _ in pieces)


def _templates(spec: TaskSpec) -> list[tuple[str, str]]:
    prompts = [spec.prompt] if isinstance(spec.prompt, str) else [message.content for message in spec.prompt]
    return [("prompt", prompt) for prompt in prompts] + [("completion", spec.completion)]


def _check_columns(spec: TaskSpec, columns: Sequence[str], where: str) -> None:
    for key, template in _templates(spec):
        for name in template_fields(template):
            if name not in columns:
                raise InputError(f"{where}: {key} names {{{name}}}, which is no column; {nearest(name, columns)}")


def _render(spec: TaskSpec, row: Mapping[str, Any], where: str) -> Example:
    for _, template in _templates(spec):
        for name in template_fields(template):
            if row[name] is None:
                raise InputError(f"{where}: column {name!r} has no value; fill it in or drop the row")
    if isinstance(spec.prompt, str):
        prompt: str | tuple[Mapping[str, str], ...] = _fill(spec.prompt, row)
    else:
        prompt = tuple({"role": turn.role, "content": _fill(turn.content, row)} for turn in spec.prompt)
    if spec.labels is None:
        return Example(prompt, _fill(spec.completion, row))
    column = template_fields(spec.completion)[0]
    return Example(prompt, _render_completion(spec, _label_text(spec, row[column], f"{where}, column {column!r}")))


def _render_completion(spec: TaskSpec, label: str) -> str:
    return _fill(spec.completion, {template_fields(spec.completion)[0]: label})


def _label_text(spec: TaskSpec, value: Any, where: str) -> str:
    labels = spec.labels or ()
    # A label's own text comes before its place in the list, so that labels like "1" and "2" mean themselves.
    if str(value) in labels:
        return labels[str(value)] if isinstance(labels, dict) else str(value)
    if (
        isinstance(labels, tuple)
        and not isinstance(value, bool)
        and str(value).isdecimal()
        and int(value) < len(labels)
    ):
        return labels[int(value)]
    raise InputError(
        f"{where}: {value!r} is not one of the labels ({', '.join(labels)}); add it to `labels` or drop it"
    )
