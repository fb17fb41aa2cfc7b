"""A tiny base model in a folder, and a pupil that learns tasks on it by drawing rows at random."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import URL, Connection, create_engine
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from neft.audit import base_fingerprint, state_digest
from neft.models import Dtype, load_base
from neft.neurons import Kind, NeuronSet, NeuronSpace
from neft.overlay import Overlay
from registry import Entry, NewEntry, Registry
from registry.database import database_url
from tests.registry.postgres import drop_databases, new_database

Weights = dict[str, torch.Tensor]


def save_base(folder: Path, seed: int) -> Path:
    """A tiny random Llama and its tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    words = {f"w{index}": index for index in range(62)} | {"<unk>": 62, "</s>": 63}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model: torch.nn.Module, weights: Weights) -> bool:
    """Whether every weight of the model is the one that was kept."""
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


@cache
def _loaded(folder: Path, dtype: Dtype) -> torch.nn.Module:
    return load_base(str(folder), dtype)[0]


@dataclass
class Pupil:
    """Learns tasks on one base model, one after another: 5 neurons a site, their rows drawn at random."""

    registry: Registry
    folder: Path
    step: int = 0
    parent: Entry | None = None
    dtype: Dtype = "float32"
    kinds: Sequence[Kind] = ("ffn",)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(_loaded(self.folder, self.dtype))
        self.space = NeuronSpace.from_model(self.model, self.kinds)
        self.base = base_fingerprint(self.model)
        self.registry.add_base_model(
            self.base,
            str(self.folder),
            self.dtype,
            json.loads(self.model.config.to_json_string()),
            self.model.num_parameters(),
        )

    def learn(self, task: str, neurons: NeuronSet | None = None, **fields: Any) -> NewEntry:
        """Change the model as a task would, in neurons drawn at random or these, and say what there is to record."""
        self.step += 1
        torch.manual_seed(self.step)
        if neurons is None:
            neurons = NeuronSet(self.space, {site.name: torch.randperm(site.size)[:5] for site in self.space.sites})
        before = Overlay.read(self.model, neurons)
        overlay = replace(before, values={name: torch.randn_like(rows) for name, rows in before.values.items()})
        overlay.lay_on(self.model)
        given = {
            "task": task,
            "stream": "demo",
            "base_model": self.base,
            "parent": self.parent,
            "input_digest": f"{self.folder.name}-{self.step}",
            "seed": 2**40 + self.step,
            "data_fingerprint": f"data-{task}",
            "method": {"kinds": ["ffn"], "scorer": "taylor", "budget": 0.1},
            "training": {"epochs": 1},
            "neurons": neurons,
            "overlay": overlay,
            "scores": None,
            "state_digest": state_digest(self.model),
            "metrics": {"accuracy": 0.75},
            "audit": {"identical": True},
            "versions": {"torch": torch.__version__},
        }
        return NewEntry(**(given | fields))

    def of(self, *indices: int) -> NeuronSet:
        """These neurons of every site."""
        return NeuronSet(self.space, {site.name: indices for site in self.space.sites})

    def record(self, task: str, **fields: Any) -> Entry:
        """Learn a task on top of the last one, and record it."""
        self.parent = self.registry.record(self.learn(task, **fields))
        return self.parent


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base", seed=0)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return save_base(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@cache
def _empty_database() -> bytes:
    """The SQLite database of a registry in which nothing is recorded: to make it takes as long as many a test."""
    with tempfile.TemporaryDirectory() as name:
        Registry.open(name).close()
        return Path(name, "registry.db").read_bytes()


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.joinpath("registry.db").write_bytes(_empty_database())


@pytest.fixture
def registry(folder: Path) -> Iterator[Registry]:
    """A registry in a folder, on SQLite."""
    _prepare(folder)
    opened = Registry.open(folder)
    yield opened
    opened.close()


@dataclass(frozen=True)
class Place:
    """Where a registry is: what `Registry.open` takes, so that other processes can open it too."""

    kind: str
    arguments: dict[str, Any]
    #: The folder of its files.
    artifacts: Path

    def open(self) -> Registry:
        return Registry.open(**self.arguments)

    @property
    def url(self) -> URL:
        """The database's, for SQL that no registry would say."""
        if self.kind == "sqlite":
            return URL.create("sqlite", database=str(self.arguments["location"] / "registry.db"))
        return database_url(self.arguments["url"])

    @contextmanager
    def sql(self) -> Iterator[Connection]:
        """A connection of its own to the database; each statement is a transaction."""
        engine = create_engine(self.url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()


@contextmanager
def new_place(kind: str, folder: Path, schema: bool = True) -> Iterator[Place]:
    """A place where nothing is recorded; without `schema`, not even a table is there."""
    if kind == "sqlite":
        if schema:
            _prepare(folder)
        yield Place("sqlite", {"location": folder}, folder / "artifacts")
        return
    with new_database(schema) as url:
        yield Place("postgresql", {"url": url, "artifacts": folder / "artifacts"}, folder / "artifacts")


@pytest.fixture(scope="session", autouse=True)
def _databases() -> Iterator[None]:
    yield
    drop_databases()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    """A registry's place on each database; what uses it runs on SQLite and on a real PostgreSQL."""
    with new_place(request.param, folder) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def bare_place(request: pytest.FixtureRequest, folder: Path) -> Iterator[Place]:
    """A place without any table, on each database."""
    with new_place(request.param, folder, schema=False) as made:
        yield made


@pytest.fixture
def anywhere(place: Place) -> Iterator[Registry]:
    """An open registry on each database."""
    opened = place.open()
    yield opened
    opened.close()


@pytest.fixture
def student(anywhere: Registry, base: Path) -> Pupil:
    """A pupil on each database."""
    return Pupil(anywhere, base)


@pytest.fixture
def pupil(registry: Registry, base: Path) -> Pupil:
    return Pupil(registry, base)


@pytest.fixture
def new_pupil() -> Callable[..., Pupil]:
    """Makes further pupils, of other base models."""
    return Pupil


@pytest.fixture
def keep() -> Callable[[torch.nn.Module], Weights]:
    """Keeps a copy of a model's weights, apart from overlays and registries."""
    return weights_of


@pytest.fixture
def is_same() -> Callable[[torch.nn.Module, Weights], bool]:
    return same
