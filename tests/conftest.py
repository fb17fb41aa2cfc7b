"""Shared by all tests: one Prefect server for the session, and a tiny stream that was learnt once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import Neft, runner
from tests.learnt import Learnt, learn
from tests.tiny import write_stream


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """An ephemeral Prefect server with a database of its own, started once."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def neft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Neft:
    """Run `neft ARGUMENTS` in this process."""
    return runner(monkeypatch, capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh neft home."""
    folder = tmp_path / "home"
    monkeypatch.setenv("NEFT_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of the tiny stream."""
    return write_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture(scope="session")
def learnt(stream: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Learnt]:
    """The tiny stream, learnt without disturbance."""
    yield learn(stream, tmp_path_factory.mktemp("home"))
