"""The commands that write, share, undo and check what was learnt: one sentence, JSON for scripts, and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from registry import Registry
from tests.command import Neft
from tests.registry.conftest import Pupil, save_base, weights_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base", seed=0)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Path]:
    """A registry of three tasks; the last has changed a neuron of the first."""
    folder = tmp_path_factory.mktemp("learnt") / "registry"
    with closing(Registry.open(folder)) as registry:
        pupil = Pupil(registry, base)
        for task, indices in (("films", (0, 1, 2)), ("news", (5,)), ("mail", (2, 9))):
            pupil.record(task, neurons=pupil.of(*indices))
    yield folder


@pytest.fixture
def folder(learnt: Path, tmp_path: Path, home: Path) -> Path:
    """A copy of it, to be written to."""
    return shutil.copytree(learnt, tmp_path / "registry")


def test_checkout_writes_a_model_or_an_adapter(folder: Path, base: Path, neft: Neft, tmp_path: Path) -> None:
    with closing(Registry.open(folder)) as registry:
        entry = registry.get("news")
        expected = weights_of(registry.checkout(entry)[0])
    outcome = neft("registry", "checkout", "news", "--to", tmp_path / "model", "--registry", folder)
    assert outcome.code == 0
    assert f"news@1: the model after it is in {tmp_path / 'model'}, bit for bit" in outcome.out
    written = weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    options = ("--to", tmp_path / "adapter", "--adapter", "--json", "--registry", folder)
    assert json.loads(neft("registry", "checkout", "news@1", *options).out) == {
        "entry": "news@1",
        "folder": str(tmp_path / "adapter"),
        "state_digest": entry.state_digest,
        "adapter": True,
    }
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    for found in (written, weights_of(adapted.merge_and_unload())):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = neft("registry", "checkout", "news", *options)
    assert again.code == 2
    assert f"{tmp_path / 'adapter'} exists already; name a new one" in again.err


def test_export_and_import_into_a_new_registry(folder: Path, neft: Neft, tmp_path: Path) -> None:
    file, other = tmp_path / "news.zip", tmp_path / "other"
    outcome = neft("registry", "export", "news", "--to", file, "--registry", folder)
    assert outcome.code == 0
    assert f"news@1: 2 entries, {file.stat().st_size / 1000:.1f} kB, in {file}" in outcome.out
    assert neft("registry", "export", "news", "--to", file, "--registry", folder).code == 2
    listed = json.loads(
        neft("registry", "export", "films", "--to", tmp_path / "f.zip", "--json", "--registry", folder).out
    )
    assert listed["entries"] == ["films@1"]

    outcome = neft("registry", "import", file, "--registry", other)
    assert outcome.code == 0
    assert "2 entries are recorded, the last of them as news@1" in outcome.out
    again = json.loads(neft("registry", "import", file, "--json", "--registry", other).out)
    assert again == {"entry": "news@1", "entries": ["films@1", "news@1"]}
    outcome = neft("registry", "import", file, "--max-bytes", 1000, "--registry", other)
    assert outcome.code == 2 and "more than the 1,000 that are allowed" in outcome.err
    file.write_bytes(file.read_bytes()[:-500])
    outcome = neft("registry", "import", file, "--registry", tmp_path / "third")
    assert outcome.code == 2
    assert outcome.err.startswith(f"neft: {file} cannot be imported: ")
    assert outcome.err.count("\n") == 1


def test_forget(folder: Path, neft: Neft) -> None:
    outcome = neft("registry", "forget", "films", "--registry", folder)
    assert outcome.code == 2
    assert "later tasks have changed neurons of it, mail@1 (2 neurons)" in outcome.err
    outcome = neft("registry", "forget", "films", "--overlaps", "lst", "--registry", folder)
    assert outcome.code == 2 and "did you mean 'last'" in outcome.err
    outcome = neft("registry", "forget", "films", "--overlaps", "sum", "--registry", folder)
    assert outcome.code == 0
    assert "films@2: films@1 is taken out of the chain of mail@1, 6 neurons given back" in outcome.out
    shown = json.loads(neft("registry", "forget", "news", "--head", "films", "--json", "--registry", folder).out)
    assert (shown["reference"], shown["parent"], shown["forgets"]) == ("news@2", "films@2", "news@1")
    outcome = neft("registry", "forget", "news@1", "--registry", folder)
    assert outcome.code == 2 and "news@1 is forgotten already in the chain of news@2" in outcome.err


def test_verify_and_gc(folder: Path, neft: Neft) -> None:
    outcome = neft("registry", "verify", "--registry", folder)
    assert outcome.code == 0
    assert "the registry is whole: 3 entries with 3 files, " in outcome.out
    orphan = folder / "artifacts" / "ab" / f"{'ab' * 32}.safetensors"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"rows")
    os.utime(orphan, (time.time() - 2 * 24 * 3600,) * 2)
    outcome = neft("registry", "verify", "--quick", "--registry", folder)
    assert outcome.code == 0
    assert "1 file belongs to no entry" in outcome.out and orphan.name in outcome.out
    kept = neft("registry", "gc", "--older-than", 72, "--registry", folder)
    assert kept.code == 0 and "0 files, 0 bytes, removed" in kept.out
    assert "1 file, 4 bytes, would be removed" in neft("registry", "gc", "--dry-run", "--registry", folder).out
    assert orphan.exists()
    removed = json.loads(neft("registry", "gc", "--json", "--registry", folder).out)
    assert removed["orphans"] == [{"path": f"ab/{orphan.name}", "kind": "orphan", "bytes": 4}]
    assert not orphan.exists()


def test_verify_ends_with_1_when_something_is_damaged(folder: Path, neft: Neft) -> None:
    with closing(Registry.open(folder)) as registry:
        path = registry.artifacts.path(registry.get("news").overlay_file.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    outcome = neft("registry", "verify", "--registry", folder)
    assert outcome.code == 1
    assert "truncated" in outcome.out and "news@1" in outcome.out
    assert outcome.err.startswith("neft: 1 thing is missing or damaged in the registry of 3 entries with 3 files")
    outcome = neft("registry", "verify", "--json", "--registry", folder)
    assert outcome.code == 1
    report = json.loads(outcome.out)
    assert report["whole"] is False
    [problem] = report["problems"]
    assert (problem["what"], problem["fault"], problem["entries"]) == ("file", "truncated", ["news@1"])


def test_upgrade(folder: Path, neft: Neft, tmp_path: Path) -> None:
    outcome = neft("registry", "upgrade", "--registry", folder)
    assert outcome.code == 0
    with closing(sqlite3.connect(folder / "registry.db")) as connection:
        [[revision]] = connection.execute("SELECT version_num FROM neft_alembic_version")
    assert f"at schema {revision} already" in outcome.out
    described = json.loads(neft("registry", "upgrade", "--json", "--registry", folder).out)
    assert described == {"before": revision, "after": revision}
    with closing(sqlite3.connect(folder / "registry.db")) as connection, connection:
        connection.execute("UPDATE neft_alembic_version SET version_num = '9999'")
    outcome = neft("registry", "upgrade", "--registry", folder)
    assert outcome.code == 1 and "a newer neft wrote it" in outcome.err
    outcome = neft("registry", "upgrade", "--registry", tmp_path / "nowhere")
    assert outcome.code == 2 and "there is no registry" in outcome.err


@pytest.mark.parametrize("command", ["checkout", "export", "import", "forget", "verify", "gc", "upgrade"])
def test_every_command_has_an_example(command: str, neft: Neft) -> None:
    outcome = neft("registry", command, "--help")
    assert outcome.code == 0
    assert f"Example: neft registry {command}" in " ".join(outcome.out.replace("│", " ").split())
