"""A stream run of a test, and where it left its records."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.config import load_config
from flows.home import Home
from flows.launch import run_stream
from registry import Registry, Run


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


@cache
def empty_store() -> bytes:
    """MLflow's database before anything is recorded: to make it takes a second."""
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        MlflowClient(home.mlflow_uri).search_experiments()
        return (home.path / "mlflow.db").read_bytes()


def learn(config: Path, home: Path, *overrides: str) -> Learnt:
    """Run a stream in this process, with `home` as its home."""
    if not home.joinpath("mlflow.db").exists():
        home.mkdir(parents=True, exist_ok=True)
        home.joinpath("mlflow.db").write_bytes(empty_store())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEFT_HOME", str(home))
        parsed = load_config(config, overrides)
        run_stream(parsed)
    found = Home(home.resolve())
    with closing(Registry.open(found.registry)) as registry:
        return Learnt(config, found, registry.newest_run(parsed.stream))
