"""A comparison's config: a stream, methods, orders, seeds and learning rates; and the cells that they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from flows.config import STRATEGIES, StreamConfig, apply_override, config_of, read_mapping, validated
from neft.errors import InputError, nearest
from neft.tasks import Spec

#: Name of the stream's own order, where a comparison names none, and of the tasks learnt alone.
OWN_ORDER, ALONE = "own", "alone"

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class ComparisonSpec(Spec):
    """Methods, orders, seeds and learning rates, each with each: one stream run for every combination."""

    compare: str = Field(pattern=_NAME, description="name of the comparison; names its streams and MLflow experiment")
    stream: Path | dict[str, Any] = Field(
        description="the stream's config: a file, or its keys; `stream: NAME` is not needed"
    )
    methods: dict[str, dict[str, Any]] = Field(
        description="method -> what it changes in the stream's config; paths are relative to the stream's file"
    )
    orders: dict[str, tuple[str, ...]] = Field({}, description="order -> names of tasks; default: the stream's own")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        (0,), min_length=1, description="seeds; learning rates are tried on the first"
    )
    learning_rates: dict[str, tuple[float, ...]] = Field(
        {},
        description="method -> learning rates to try on the first seed and order; the one with the best learning "
        "accuracy (average accuracy where a method has none) is used for the rest",
    )
    separate: bool = Field(False, description="learn every task alone, from the base model; it has no order then")

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("methods", "orders", "learning_rates")
    @classmethod
    def _good_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not name or not all(character.isalnum() or character in "_-" for character in name):
                raise ValueError(f"{name!r} is no name; use letters, digits, - and _")
        return named

    @field_validator("seeds")
    @classmethod
    def _unlike_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for seed in seeds:
            if seeds.count(seed) > 1:
                raise ValueError(f"seed {seed} stands twice; name each seed once")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.methods:
            raise ValueError("`methods` is empty; name at least one")
        for method, rates in self.learning_rates.items():
            if method not in self.methods:
                raise ValueError(f"`learning_rates` names method {method!r}; {nearest(method, self.methods)}")
            if not rates or len(set(rates)) < len(rates) or min(rates) <= 0:
                raise ValueError(f"`learning_rates.{method}` must be different numbers above 0, at least one")
        if self.separate and self.orders:
            raise ValueError(
                "`separate: true` learns every task alone, so `orders` has no meaning; leave one of them out"
            )
        return self


@dataclass(frozen=True)
class Cell:
    """What one process learns: a stream by one method, in one order, with one seed and learning rate.

    In a separate comparison it is a stream of one task for each task.
    """

    method: str
    order: str
    seed: int
    rate: float
    streams: tuple[StreamConfig, ...]

    @property
    def name(self) -> str:
        """`compare.method.order.seed.rate`, the name of its stream where it is one."""
        return f"{self.streams[0].tracking.tags['neft.compare']}.{self.suffix}"

    @property
    def suffix(self) -> str:
        return f"{self.method}.{self.order}.{self.seed}.{written(self.rate)}"


def written(rate: float) -> str:
    """A learning rate as a part of a name."""
    return f"{rate:g}".replace("+", "")


@dataclass(frozen=True)
class Comparison:
    """A validated comparison: every method's stream is known to be well-formed."""

    spec: ComparisonSpec
    folder: Path
    streams: Mapping[str, StreamConfig]

    @property
    def name(self) -> str:
        return self.spec.compare

    @property
    def config(self) -> StreamConfig:
        """The first method's stream; where its runs are kept and shown, all are."""
        return next(iter(self.streams.values()))

    @property
    def experiment(self) -> str:
        """The MLflow experiment of every cell."""
        return self.config.tracking.experiment or self.name

    @cached_property
    def orders(self) -> Mapping[str, tuple[str, ...]]:
        """Order -> the tasks' names."""
        own = tuple(task.name for task in self.config.tasks)
        if self.spec.separate:
            return {ALONE: own}
        return self.spec.orders or {OWN_ORDER: own}

    def rates(self, method: str) -> tuple[float, ...]:
        """Learning rates to try; the config's own where none are named."""
        return self.spec.learning_rates.get(method, (self.streams[method].training.learning_rate,))

    def first(self) -> list[Cell]:
        """The cells that come first: every method and learning rate on the first order and seed."""
        order, seed = next(iter(self.orders)), self.spec.seeds[0]
        return [self.cell(method, order, seed, rate) for method in self.spec.methods for rate in self.rates(method)]

    def rest(self, chosen: Mapping[str, float]) -> list[Cell]:
        """The other cells, of the methods whose learning rate is chosen: by order, by seed, then as methods are listed.

        Args:
            chosen: method -> learning rate.
        """
        return [
            self.cell(method, order, seed, chosen[method]) for method, order, seed in self._places() if method in chosen
        ]

    def unknown(self, chosen: Mapping[str, float]) -> list[str]:
        """What is to be learnt once a learning rate is chosen, as `method.order.seed`."""
        return [f"{method}.{order}.{seed}" for method, order, seed in self._places() if method not in chosen]

    def _places(self) -> Iterator[tuple[str, str, int]]:
        places = [(order, seed) for order in self.orders for seed in self.spec.seeds]
        for order, seed in places[1:]:
            for method in self.spec.methods:
                yield method, order, seed

    def cell(self, method: str, order: str, seed: int, rate: float) -> Cell:
        """One cell."""
        names = self.orders[order]
        groups = [(name,) for name in names] if self.spec.separate else [names]
        first = order == next(iter(self.orders)) and seed == self.spec.seeds[0]
        tags = {"neft.compare": self.name, "neft.method": method, "neft.order": order}
        tags |= {"neft.learning_rate": f"{rate:g}", "neft.tuning": str(first).lower()}
        config, streams = self.streams[method], []
        tasks = {task.name: task for task in config.tasks}
        for group in groups:
            place = group[0] if self.spec.separate else order
            changes = {
                "stream": f"{self.name}.{method}.{place}.{seed}.{written(rate)}",
                "tasks": tuple(tasks[name] for name in group),
                "training": config.training.model_copy(update={"learning_rate": rate}),
                "tracking": self.config.tracking.model_copy(update={"experiment": self.experiment, "tags": tags}),
                "registry": self.config.registry,
                "seed": seed,
            }
            streams.append(config.model_copy(update=changes))
        return Cell(method, order, seed, rate, tuple(streams))


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison's config and every method's stream.

    Args:
        overrides: `a.b=c` on top of it; `stream.training.max_steps=5` changes the stream's config, in a file or not.

    Raises:
        InputError: no such file, not YAML, or every key that is wrong, one a line.
    """
    path = Path(path)
    ours = [each for each in overrides if not each.startswith("stream.")]
    theirs = [each.removeprefix("stream.") for each in overrides if each.startswith("stream.")]
    spec = validated(ComparisonSpec, read_mapping(path, "compare", ours), str(path))
    folder = path.parent.resolve()
    base, folder = _stream_of(spec, folder, theirs)
    streams = {
        method: config_of(_changed(base, changes) | {"stream": spec.compare}, f"{path}, method {method!r}", folder)
        for method, changes in spec.methods.items()
    }
    _check_orders(spec, streams, str(path))
    return Comparison(spec, folder, streams)


def _stream_of(spec: ComparisonSpec, folder: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """The stream's raw config, and what its paths are relative to."""
    if isinstance(spec.stream, Path):
        file = folder / spec.stream.expanduser()
        return read_mapping(file, "stream", overrides), file.parent.resolve()
    raw = deepcopy(spec.stream)
    for override in overrides:
        apply_override(raw, override)
    return raw, folder


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, key by key; a strategy, whose options are its own, is replaced as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and key not in STRATEGIES:
            merged[key] = _changed(old, value)
        else:
            merged[key] = value
    return merged


def _check_orders(spec: ComparisonSpec, streams: Mapping[str, StreamConfig], where: str) -> None:
    """
    Raises:
        InputError: an order that names no task, a task that is none, or a task twice.
    """
    for order, names in spec.orders.items():
        if not names:
            raise InputError(f"{where}: orders.{order} is empty; name the tasks in the order to learn them")
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{where}: orders.{order} names task {name!r} twice; name each task once")
        for method, config in streams.items():
            known = [task.name for task in config.tasks]
            for name in names:
                if name not in known:
                    raise InputError(
                        f"{where}: orders.{order} names task {name!r}, which method {method!r} does not have; "
                        f"{nearest(name, known)}"
                    )
