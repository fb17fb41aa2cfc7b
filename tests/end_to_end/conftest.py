"""A tiny stream, learnt once for the tests that only look at what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.config import load_config
from flows.home import Home
from flows.launch import run_stream
from registry import Registry, Run
from tests.tiny import write_stream


@dataclass(frozen=True)
class Learnt:
    """A finished run of a stream, and where it left its records."""

    config: Path
    home: Home
    run: Run

    def registry(self) -> closing[Registry]:
        return closing(Registry.open(self.home.registry))

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(self.home.mlflow_uri)


def learn(config: Path, home: Path, *overrides: str) -> Learnt:
    """Run a stream in this process, with `home` as its home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEFT_HOME", str(home))
        parsed = load_config(config, overrides)
        run_stream(parsed)
    found = Home(home.resolve())
    with closing(Registry.open(found.registry)) as registry:
        return Learnt(config, found, registry.newest_run(parsed.stream))


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of the tiny stream."""
    return write_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="session")
def learnt(stream: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Learnt]:
    """The tiny stream, learnt without disturbance."""
    yield learn(stream, tmp_path_factory.mktemp("home"))
