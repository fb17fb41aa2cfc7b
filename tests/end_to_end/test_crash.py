"""A stream that is killed goes on where it stopped, to the same result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flows.home import Home
from tests.learnt import Learnt, learn

COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]


def run_until(config: Path, home: Path, line: str) -> None:
    """Run `neft run` in a process of its own, and SIGKILL it and what it started once it has said `line`."""
    environment = {**os.environ, "NEFT_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    process = subprocess.Popen(
        [*COMMAND, "run", str(config)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = []
    for text in process.stderr:
        said.append(text)
        if line in text:
            break
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.wait(timeout=30)
    assert line in "".join(said), "".join(said)


@pytest.mark.parametrize("line", ["[3/3] places: chose", "[3/3] places: trained"])
def test_killed_in_its_third_task_a_stream_finishes_as_if_undisturbed(
    line: str, stream: Path, learnt: Learnt, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_until(stream, tmp_path, line)
    with Learnt(stream, Home(tmp_path), learnt.run).registry() as registry:
        assert [entry.reference for entry in registry.list()] == ["colours@1", "animals@1"]
        assert registry.newest_run("tiny").status == "running"
    resumed = learn(stream, tmp_path)
    assert capsys.readouterr().err.count("not learnt again") == 2
    assert resumed.run.matrix == learnt.run.matrix
    assert resumed.run.metrics == learnt.run.metrics
    with resumed.registry() as after, learnt.registry() as undisturbed:
        for name in ("colours", "animals", "places"):
            assert after.get(name).state_digest == undisturbed.get(name).state_digest
            assert after.get(name).overlay_file == undisturbed.get(name).overlay_file
    runs = resumed.mlflow.search_runs([resumed.run.tracking["experiment_id"]])
    assert sorted(run.info.run_name for run in runs) == ["animals", "colours", "places", "tiny"]
    assert {run.info.status for run in runs} == {"FINISHED"}
