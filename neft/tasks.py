"""A task: its data, prompt, completion, labels and metric; from a config's words to rendered examples."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from neft.errors import FailedError, InputError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

Metric = Literal["accuracy", "exact_match", "rouge_l"]
Part = Literal["train", "eval"]

#: What a data file's ending says about its format, in the words of `datasets.load_dataset`.
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
    labels: tuple[str, ...] | dict[str | int | bool, str] | None = Field(
        None,
        description="for classification: the label texts (a list, indexed by integer columns), or column value: text",
    )
    metric: Metric | None = Field(None, description="`accuracy` with labels; else `exact_match` (default) or `rouge_l`")
    max_new_tokens: int = Field(64, gt=0, description="longest generated answer, for `exact_match` and `rouge_l`")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
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
        about = f"{self.metric}\0{self.completions}\0{self.max_new_tokens}"
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
    source, rows = _rows(spec, part)
    where = f"task {spec.name!r}, {part} data {source}"
    if len(rows) == 0:
        raise InputError(f"{where}: there are no rows; give a file or split with at least one")
    _check_columns(spec, rows.column_names, where)
    limit = spec.data.limit_of(part)
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))
    return tuple(_render(spec, row, f"{where}, row {number}") for number, row in enumerate(rows))


def _rows(spec: TaskSpec, part: Part) -> tuple[str, Dataset]:
    if spec.data.files is not None:
        given = getattr(spec.data.files, part)
        paths = (given,) if isinstance(given, Path) else given
        return ", ".join(str(path) for path in paths), _read_files(spec.name, part, paths)
    return f"{spec.data.hub}[{getattr(spec.data.split or Split(), part)}]", _read_hub(spec, part)


def _read_files(task: str, part: Part, paths: Sequence[Path]) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not paths:
        raise InputError(f"task {task!r}: data.files.{part} is an empty list; name at least one file")
    for path in paths:
        if path.suffix not in FORMATS:
            raise InputError(
                f"task {task!r}: data.files.{part} {str(path)!r} ends in {path.suffix!r}; "
                f"known endings: {', '.join(FORMATS)}"
            )
        if not path.is_file():
            raise InputError(f"task {task!r}: data.files.{part}: no such file: {path}")
        if path.stat().st_size == 0:
            raise InputError(f"task {task!r}: data.files.{part} {path} is empty; give a file with at least one row")
    if len({path.suffix for path in paths}) > 1:
        raise InputError(f"task {task!r}: data.files.{part} mixes endings; use one format for one part")
    try:
        return load_dataset(FORMATS[paths[0].suffix], data_files=[str(path) for path in paths], split="train")
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(
            f"task {task!r}: data.files.{part} {', '.join(map(str, paths))} cannot be read as "
            f"{paths[0].suffix.lstrip('.')}: {reason}"
        ) from error


def _read_hub(spec: TaskSpec, part: Part) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    split = getattr(spec.data.split or Split(), part)
    try:
        return load_dataset(spec.data.hub, spec.data.config, split=split)
    except (DatasetNotFoundError, ValueError) as error:
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
    fields = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or spec or conversion or not all(character not in ".[]" for character in name):
            raise ValueError(f"template field {{{name}}} must be a plain column name; write {{{{ }}}} for a brace")
        fields.append(name)
    return tuple(dict.fromkeys(fields))


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
        prompt: str | tuple[Mapping[str, str], ...] = spec.prompt.format(**row)
    else:
        prompt = tuple({"role": turn.role, "content": turn.content.format(**row)} for turn in spec.prompt)
    if spec.labels is None:
        return Example(prompt, spec.completion.format(**row))
    column = template_fields(spec.completion)[0]
    return Example(prompt, _render_completion(spec, _label_text(spec, row[column], f"{where}, column {column!r}")))


def _render_completion(spec: TaskSpec, label: str) -> str:
    return spec.completion.format(**{template_fields(spec.completion)[0]: label})


def _label_text(spec: TaskSpec, value: Any, where: str) -> str:
    if isinstance(spec.labels, dict):
        for key, text in spec.labels.items():
            if str(key) == str(value):
                return text
        known: Iterable[str] = map(str, spec.labels)
    else:
        labels = spec.labels or ()
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(labels):
            return labels[value]
        if value in labels:
            return str(value)
        known = labels
    raise InputError(f"{where}: {value!r} is not one of the labels ({', '.join(known)}); add it to `labels` or drop it")
