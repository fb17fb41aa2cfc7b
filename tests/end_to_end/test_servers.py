"""A stream run against a real MLflow server and a real Prefect server, over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from tests.end_to_end.test_crash import COMMAND
from tests.tiny import write_stream


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: list[str], health: str, environment: dict[str, str]) -> Iterator[None]:
    """Start a server, wait until it answers, and end it and what it started."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(health, timeout=2).is_success:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline, f"{command[0]} does not answer at {health}"
                assert process.poll() is None, f"{command} ended with {process.returncode}"
                time.sleep(0.3)
        yield
    finally:
        for member in [*psutil.Process(process.pid).children(recursive=True), process]:
            member.kill()
        process.wait(timeout=30)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment that points at both servers."""
    mlflow_port, prefect_port = free_port(), free_port()
    environment = {
        **os.environ,
        "NEFT_HOME": str(tmp_path / "home"),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    environment.pop("PREFECT_API_URL", None)
    store = f"sqlite:///{tmp_path / 'server.db'}"
    mlflow = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    mlflow += ["--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(mlflow_port)]
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--port", str(prefect_port), "--no-ui"]
    urls = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
    }
    with (
        serving(mlflow, f"{urls['MLFLOW_TRACKING_URI']}/health", environment),
        serving(prefect, f"{urls['PREFECT_API_URL']}/health", environment),
    ):
        yield {**environment, **urls}


def test_a_stream_is_seen_on_both_servers(servers: dict[str, str], tmp_path: Path) -> None:
    config = write_stream(tmp_path, tasks=2)
    done = subprocess.run(
        [*COMMAND, "run", str(config)], env=servers, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{servers['MLFLOW_TRACKING_URI']}/#/experiments/" in done.stdout
    client = MlflowClient(tracking_uri=servers["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"tiny", "colours", "animals"}
    assert len(client.get_metric_history(runs["tiny"].info.run_id, "accuracy/animals")) == 3
    assert {file.path for file in client.list_artifacts(runs["tiny"].info.run_id)} == {"r_matrix.json", "r_matrix.png"}
    flow_runs = httpx.post(f"{servers['PREFECT_API_URL']}/flow_runs/filter", json={}, timeout=10).json()
    states = {run["name"]: run["state_type"] for run in flow_runs}
    assert states == {"tiny": "COMPLETED", "colours": "COMPLETED", "animals": "COMPLETED"}
    task_runs = httpx.post(f"{servers['PREFECT_API_URL']}/task_runs/filter", json={}, timeout=10).json()
    # A subflow stands among its parent's task runs too, as `neft-task-N`.
    names = {run["name"].split(" ")[0] for run in task_runs if not run["name"].startswith("neft-task-")}
    assert names == {"load", "score", "select", "train", "evaluate", "record"}
