"""Transfer in a stream: what a later stream starts from, off by default, and the same after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.workbench import Workbench
from neft.errors import InputError
from tests.learnt import Learnt, learn
from tests.tiny import write_stream


def related(config: Path, stream: str, source: str) -> Path:
    """A stream of its own that asks of colours again, under other labels."""
    described = yaml.safe_load(config.read_text())
    task = described["tasks"][2]
    method = described["method"] | {"transfer": {"source": source, "probe_steps": 3}}
    path = config.parent / f"{stream}.yaml"
    path.write_text(yaml.safe_dump(described | {"stream": stream, "tasks": [task], "method": method}))
    return path


def entries(learnt: Learnt) -> list[str]:
    with learnt.registry() as registry:
        return [entry.reference for entry in registry.list()]


@pytest.mark.usefixtures("prefect_server")
def test_a_stream_starts_from_another_and_goes_on_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, home = write_stream(tmp_path / "stream"), tmp_path / "home"
    described = yaml.safe_load(config.read_text())
    first = config.parent / "first.yaml"
    first.write_text(yaml.safe_dump(described | {"tasks": described["tasks"][:1]}))
    learn(first, home)
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "finish", lambda self: (_ for _ in ()).throw(RuntimeError("a crash")))
        with pytest.raises(RuntimeError, match="a crash"):
            learn(related(config, "other", "auto"), home)
    third = learn(related(config, "third", "none"), home)
    recorded = entries(third)
    again = learn(related(config, "other", "auto"), home)
    assert again.run.status == "finished"
    assert entries(again) == recorded, "what was learnt before the crash is not learnt again"
    with again.registry() as registry:
        (entry,) = registry.list("other")
        (plain,) = registry.list("third")
    found = entry.metrics["transfer"]
    assert {each["entry"] for each in found["proposals"]} == {"colours@1"}
    assert found["start"] in ("fresh", "warm")
    assert "fresh" in found["held_out_losses"]
    assert len(found["held_out_losses"]) == 2
    assert plain.metrics["transfer"] is None
    tags = again.mlflow.get_run(entry.mlflow_run_id or "").data.tags
    assert tags["neft.transfer"].startswith(found["start"])


@pytest.mark.usefixtures("prefect_server")
def test_a_source_that_was_never_learnt_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"method\.transfer names 'colors'"):
        learn(related(write_stream(tmp_path / "stream"), "other", "colors"), tmp_path / "home")
