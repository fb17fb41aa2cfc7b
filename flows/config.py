"""The config: one YAML file that names a stream's model, tasks, method, training, evaluation and where it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flows.registries import check_store
from neft.architectures import Anatomy
from neft.baselines import BASELINES
from neft.errors import InputError, nearest
from neft.evaluation import EvaluationSpec
from neft.models import Dtype
from neft.neurons import Kind
from neft.protection import POLICIES
from neft.scoring import SCORERS
from neft.selection import Budget, SelectionSpec
from neft.strategies import Choice, anchored, build
from neft.tasks import Spec, TaskSpec
from neft.training_spec import TrainingSpec
from neft.transfer_spec import TransferSpec
from registry.database import database_url, split_password

_Model = TypeVar("_Model", bound=BaseModel)


class ModelSpec(Spec):
    """The base model."""

    name: str = Field(description="hub id, local folder, or `.gguf` file")
    dtype: Dtype = Field("float32", description="dtype of the weights in memory")
    neurons: Anatomy | None = Field(None, description="where the neurons are, for a model family neft does not know")


class MethodSpec(Spec):
    """How a task is learnt."""

    kinds: tuple[Kind, ...] = Field(("ffn",), description="kinds of neurons to choose from")
    scorer: Choice = Field("taylor", description="scorer, by name, or `{name: ..., option: ...}`")
    scoring_examples: int = Field(48, gt=0, description="training examples that the scorer reads")
    budget: Budget = Field(
        Budget(neurons=0.1), description="how much a task may train: `0.1`, `4608`, or `{parameters: 0.09}`"
    )
    selection: SelectionSpec = Field(SelectionSpec(), description="how the budget is spent")
    protection: Choice = Field("exclude", description="protection policy, by name, or with options")
    transfer: TransferSpec = Field(
        TransferSpec(), description="what a task may start from: `auto`, `none`, a recorded task, or `task@version`"
    )
    baseline: Choice | None = Field(
        None,
        description="train by this baseline instead of by neurons, by name, or with options: "
        + ", ".join(f"`{name}`" for name in BASELINES)
        + "; nothing is recorded to reuse",
    )

    @field_validator("scorer", "protection", "baseline")
    @classmethod
    def _known_strategy(cls, choice: Choice | None, info: ValidationInfo) -> Choice | None:
        role, known = STRATEGIES[str(info.field_name)]
        if choice is None:
            return None
        # A strategy may read files of its own when it is built, so their paths are anchored first.
        choice = anchored(known, choice, (info.context or {}).get("folder", Path()))
        build(role, known, choice)
        return choice


#: Key of `method` -> what it chooses, and from what.
STRATEGIES: dict[str, tuple[str, Mapping[str, type[Any]]]] = {
    "scorer": ("scorer", SCORERS),
    "protection": ("protection policy", POLICIES),
    "baseline": ("baseline", BASELINES),
}


class TrackingSpec(Spec):
    """Where runs are shown. The environment (`MLFLOW_TRACKING_URI`, `PREFECT_API_URL`) stands in for what is absent."""

    mlflow: str | None = Field(None, description="MLflow tracking URI; default: an SQLite store in neft's home")
    prefect: str | None = Field(None, description="URL of a Prefect server's API; default: Prefect's own ephemeral one")
    experiment: str | None = Field(None, description="MLflow experiment; default: the stream's name")
    tags: dict[str, str] = Field({}, description="tags of the MLflow run, beside neft's own")


class RegistrySpec(Spec):
    """Where entries are recorded. The environment (`NEFT_REGISTRY_URL` and `NEFT_REGISTRY_ARTIFACTS`) stands in for
    what is absent; `NEFT_REGISTRY_PASSWORD` is the password of a `url` without one. It is recorded nowhere.
    """

    location: Path | None = Field(None, description="folder of the registry; default: `registry` in neft's home")
    url: str | None = Field(
        None,
        repr=False,
        description="database, in place of `location`: `postgresql://user@host/name` or `sqlite:///file.db`",
    )
    artifacts: str | None = Field(
        None, description="store of the files, beside `url`: a folder, or a URL that fsspec knows: `s3://bucket/path`"
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.url is None) != (self.artifacts is None) or (self.url is not None and self.location is not None):
            raise ValueError("give either `location`, a folder, or both `url` and `artifacts`")
        if self.url is not None and self.artifacts is not None:
            database_url(self.url)
            check_store("artifacts", self.artifacts)
        return self

    @field_serializer("url")
    def _without_password(self, url: str | None) -> str | None:
        """What is handed on and recorded; `flows.registries.keep_password` has the password."""
        return None if url is None else split_password(url)[0]


class StreamConfig(Spec):
    """A stream: a base model and the tasks that it learns, in order."""

    stream: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the stream")
    model: ModelSpec = Field(description="the base model")
    tasks: tuple[TaskSpec, ...] = Field(min_length=1, description="the tasks, in the order they are learnt")
    method: MethodSpec = Field(MethodSpec(), description="how a task is learnt")
    training: TrainingSpec = Field(TrainingSpec(), description="masked SFT, in the words of TRL's `SFTConfig`")
    evaluation: EvaluationSpec = Field(EvaluationSpec(), description="how models are evaluated")
    tracking: TrackingSpec = Field(TrackingSpec(), description="where runs are shown")
    registry: RegistrySpec = Field(RegistrySpec(), description="where entries are recorded")
    on_failure: Literal["stop", "skip"] = Field(
        "stop",
        description="when a task cannot be learnt (training diverges, a site is full): `stop` the stream, or `skip` "
        "the task and go on with the next; either way the model is as it was before the task",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of sampling, scoring and training")

    @field_validator("tasks")
    @classmethod
    def _unique_names(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name!r}; names in a stream must differ")
        return tasks

    @property
    def evaluation_spec(self) -> EvaluationSpec:
        """How models are evaluated, with training's length where evaluation names none."""
        length = self.evaluation.max_length or self.training.max_length
        return self.evaluation.model_copy(update={"max_length": length})

    def check_lengths(self, positions: int | None) -> None:
        """
        Args:
            positions: tokens that the model can tell apart by place; None for a model without such a limit.

        Raises:
            InputError: prompts and answers may be longer than the model has positions for.
        """
        lengths = {
            "training.max_length": self.training.max_length,
            "evaluation.max_length": self.evaluation.max_length or 0,
        }
        for key, length in lengths.items():
            if positions is not None and length > positions:
                raise InputError(f"{key} is {length}, but the model has {positions} positions; lower it to that")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StreamConfig:
    """Read a config, with `a.b=c` overrides on top; relative paths in it are relative to its folder.

    Raises:
        InputError: no such file, not YAML, or every key that is wrong, one a line.
    """
    raw = read_mapping(path, "stream", overrides)
    return config_of(raw, str(path), Path(path).parent.resolve())


def read_mapping(path: str | Path, first_key: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys and values of a YAML file, with `a.b=c` overrides on top.

    Args:
        first_key: the key that such a file begins with, for who has written none.

    Raises:
        InputError: no such file, not YAML, no mapping, or an override that fits nowhere.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such config: {path}; give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not a mapping of keys to values; start with `{first_key}: NAME`")
    for override in overrides:
        apply_override(raw, override)
    return raw


def config_of(raw: Mapping[str, Any], where: str, folder: Path) -> StreamConfig:
    """A stream's config from its keys and values, with every relative path made absolute, from `folder`.

    Raises:
        InputError: every key that is wrong, one a line.
    """
    return _anchored(validate_config(raw, where, folder), folder)


def validate_config(raw: Mapping[str, Any], where: str, folder: Path | None = None) -> StreamConfig:
    """
    Args:
        folder: what relative paths among a strategy's options are relative to; default: the working directory.

    Raises:
        InputError: every key that is wrong, one a line, each with its value and what to do.
    """
    return validated(StreamConfig, raw, where, folder)


def validated(model: type[_Model], raw: Mapping[str, Any], where: str, folder: Path | None = None) -> _Model:
    """A config of any model, validated as `validate_config` does a stream's."""
    try:
        return model.model_validate(raw, context={"folder": folder or Path()})
    except ValidationError as error:
        complaints = list(dict.fromkeys(_complaints(error, raw, model)))
        raise InputError("\n".join(f"{where}: {complaint}" for complaint in complaints)) from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` in a raw config; list items are named by their number."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r} is not of the form key.subkey=value")
    *parents, last = key.split(".")
    place: Any = raw
    for name in parents:
        place = place.setdefault(name, {}) if isinstance(place, dict) else _item(place, name, override)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(place, dict):
        place[last] = parsed
    else:
        _item(place, last, override)
        place[int(last)] = parsed


def _item(place: Any, name: str, override: str) -> Any:
    if not isinstance(place, list) or not name.isdecimal() or int(name) >= len(place):
        size = f"a list of {len(place)} items" if isinstance(place, list) else "no mapping"
        raise InputError(f"--set {override!r}: {name!r} is looked for in {size}; name a key, or an item by its number")
    return place[int(name)]


def _complaints(error: ValidationError, raw: Mapping[str, Any], top: type[BaseModel]) -> Iterator[str]:
    problems = error.errors(include_url=False)
    places = [_place(raw, problem["loc"], problem["type"]) for problem in problems]
    for problem, location in zip(problems, places, strict=True):
        inside = [other for other in places if len(other) > len(location) and other[: len(location)] == location]
        if inside and problem["type"] in _SHAPES | {"too_short": ""}:
            # What is inside says more: a list whose items are all refused counts as empty, a mapping is no number.
            continue
        key = ".".join(str(part) for part in location)
        value = problem["input"]
        if problem["type"] in _UNKNOWN:
            known = _known_keys(top, location[:-1])
            hint = f"; {nearest(str(location[-1]), known)}" if known else ""
            yield f"unknown key {key!r}{hint}"
        elif problem["type"] == "missing":
            yield f"key {key!r} is missing; give it a value"
        else:
            message = _SHAPES.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(value, dict | list | BaseModel) else f" (value {value!r})"
            yield f"{key}: {message}{shown}"


#: Pydantic's types of the error about a key that a model, or a dataclass, does not have.
_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}

#: Pydantic's type of an error about a value's shape -> what a config's reader would say.
_SHAPES = {
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "dataclass_type": "must be a mapping of keys to values",
    "string_type": "must be text; put it in quotes",
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "path_type": "must be a path",
}


def _place(raw: Any, location: Sequence[int | str], kind: str) -> list[int | str]:
    """The keys and numbers that lead to a problem, without the branches of unions that pydantic names between them."""
    place: Any = raw
    found: list[int | str] = []
    for number, part in enumerate(location):
        inside = part in place if isinstance(place, Mapping) else isinstance(place, list) and isinstance(part, int)
        if inside:
            place = place[part]
        if inside or (kind == "missing" and number + 1 == len(location)):
            found.append(part)
    return found


def is_model(annotation: Any) -> bool:
    """Whether a part of a config is a mapping with keys of its own: a pydantic model, or a dataclass."""
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation))


def fields_of(model: type[Any]) -> dict[str, FieldInfo]:
    """Key -> annotation, default and description of a part of a config."""
    if issubclass(model, BaseModel):
        return model.model_fields
    hints, described = get_type_hints(model), {}
    for each in fields(model):
        required = each.default is MISSING
        described[each.name] = FieldInfo(
            annotation=hints[each.name],
            default=PydanticUndefined if required else each.default,
            description=each.metadata["help"],
        )
    return described


def _known_keys(top: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Keys that the part of the config at `location` knows."""
    model: type[Any] | None = top
    for part in location:
        if isinstance(part, int):
            continue
        if model is None or part not in fields_of(model):
            return []
        model = _model_in(fields_of(model)[part].annotation)
    return list(fields_of(model)) if model else []


def _model_in(annotation: Any) -> type[Any] | None:
    if is_model(annotation):
        return cast(type[Any], annotation)
    if get_origin(annotation) in (Union, UnionType, tuple):
        return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
    return None


def _anchored(config: StreamConfig, folder: Path) -> StreamConfig:
    """The config with every relative path made absolute, from the folder of its file."""
    anchored = _with_paths(config, folder)
    name = config.model.name
    local = name.startswith(("./", "../", "~")) or name.endswith(".gguf") or (folder / name).is_dir()
    changes: dict[str, Any] = {"registry": _registry_anchored(anchored.registry, folder)}
    if local:
        absolute = str((folder / Path(name).expanduser()).resolve())
        changes["model"] = config.model.model_copy(update={"name": absolute})
    return anchored.model_copy(update=changes)


def _registry_anchored(spec: RegistrySpec, folder: Path) -> RegistrySpec:
    if spec.url is None or spec.artifacts is None:
        return spec
    changes = {}
    if "://" not in spec.artifacts:
        changes["artifacts"] = str((folder / Path(spec.artifacts).expanduser()).resolve())
    if spec.url.startswith("sqlite:///"):
        changes["url"] = "sqlite:///" + str((folder / spec.url.removeprefix("sqlite:///")).resolve())
    return spec.model_copy(update=changes)


def _with_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return (folder / value.expanduser()).resolve()
    if isinstance(value, tuple):
        return tuple(_with_paths(item, folder) for item in value)
    if isinstance(value, BaseModel):
        changes = {name: _with_paths(getattr(value, name), folder) for name in type(value).model_fields}
        return value.model_copy(update={name: new for name, new in changes.items() if new is not getattr(value, name)})
    return value
