"""The schema's history: an older registry is refused, upgraded whole or not at all, and a newer one is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DBAPIError

import registry.database
from neft.errors import FailedError, InputError
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from registry import Registry
from registry.artifacts import Artifact, FolderStore
from registry.schema import Base
from tests.registry.conftest import Place
from tests.registry.processes import at_once, die, is_killed

#: Task, version, and the number from 1 of the entry that it was built on.
ENTRIES = (("sst2", 1, None), ("qnli", 1, 1), ("sst2", 2, 2), ("alone", 1, None))
METRICS = {"accuracy": 0.75, "continual": {"forgetting": 0.25}, "note": "text", "sure": True}
FLAT = {"accuracy": 0.75, "continual/forgetting": 0.25}


@dataclass(frozen=True)
class Older:
    """A registry as revision 0002 wrote it, and the neurons of its entries, in order."""

    place: Place
    neurons: Sequence[NeuronSet]
    files: Sequence[Artifact]

    def upgrade(self) -> tuple[str | None, str | None]:
        return Registry.upgrade(**self.place.arguments)


def migrate(place: Place, revision: str) -> None:
    place.artifacts.mkdir(parents=True, exist_ok=True)
    engine = create_engine(place.url)
    with engine.begin() as connection:
        command.upgrade(registry.database._alembic_config(connection), revision)
    engine.dispose()


@pytest.fixture
def older(bare_place: Place, base: Path) -> Older:
    """A registry of revision 0002 with entries in chains."""
    migrate(bare_place, "0002")
    store = FolderStore(bare_place.artifacts)
    model, _ = load_base(str(base))
    space = NeuronSpace.from_model(model)
    found, files = [], []
    with bare_place.sql() as connection:
        model_row = {"fingerprint": "f" * 64, "name": str(base), "dtype": "float32", "config": "{}", "parameters": 1}
        _insert(connection, "base_models", id=1, created_at="2026-01-01 00:00:00+00:00", **model_row)
        for number, task in enumerate(dict.fromkeys(task for task, _, _ in ENTRIES), 1):
            _insert(connection, "tasks", id=number, name=task, base_model_id=1)
        for number, (task, version, parent) in enumerate(ENTRIES, 1):
            neurons = NeuronSet(space, {site.name: torch.arange(number, number + 5) for site in space.sites})
            overlay = store.put("overlay", Overlay.read(model, neurons).save)
            files.append(store.put("neurons", neurons.save))
            found.append(neurons)
            columns = {"id": number, "version": version, "parent_id": parent, "stream": "demo", "seed": 2**40}
            columns |= {name: f"{name} {number}" for name in ("input_digest", "data_fingerprint", "state_digest")}
            columns |= {name: json.dumps({"name": name}) for name in ("method", "training", "audit", "versions")}
            columns |= {"neurons_sha256": files[-1].sha256, "neurons_bytes": files[-1].bytes}
            columns |= {
                "overlay_sha256": overlay.sha256,
                "overlay_bytes": overlay.bytes,
                "metrics": json.dumps(METRICS),
            }
            columns |= {"neuron_count": len(neurons), "parameter_count": 7, "space_fingerprint": space.fingerprint}
            task_id = "(SELECT id FROM tasks WHERE name = :task)"
            moment = f"2026-01-0{number} 12:30:00+00:00"
            _insert(connection, "entries", {"task_id": task_id}, task=task, created_at=moment, **columns)
        if bare_place.kind == "postgresql":
            for table in ("base_models", "tasks", "entries"):
                connection.exec_driver_sql(f"SELECT setval('{table}_id_seq', 10)")
    return Older(bare_place, found, files)


def _insert(connection: Any, table: str, written: dict[str, str] | None = None, **values: Any) -> None:
    """Insert a row of values, and of what is `written` in SQL."""
    cells = {name: f":{name}" for name in values if name != "task"} | (written or {})
    statement = f"INSERT INTO {table} ({', '.join(cells)}) VALUES ({', '.join(cells.values())})"
    connection.execute(text(statement), values)


def differences(opened: Registry) -> list[Any]:
    """What the database has and the code does not read, or the other way round."""
    with opened._database._engine.connect() as connection:
        options = {"version_table": registry.database.VERSION_TABLE, "compare_type": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), Base.metadata)


def dump(place: Place) -> dict[str, Any]:
    """All tables with their columns and rows."""
    with place.sql() as connection:
        found = {}
        for table in inspect(connection).get_table_names():
            columns = [column["name"] for column in inspect(connection).get_columns(table)]
            found[table] = (columns, sorted(connection.execute(text(f"SELECT * FROM {table}")).all(), key=repr))
        return found


def test_the_migrations_make_the_tables_that_the_code_reads(bare_place):
    with closing(bare_place.open()) as opened:
        assert differences(opened) == []


def test_an_older_registry_is_refused_unchanged(older):
    before = dump(older.place)
    with pytest.raises(
        FailedError, match=r"has schema 0002, older than this neft's 0003; run `neft registry upgrade`$"
    ):
        older.place.open()
    assert dump(older.place) == before


def test_an_upgrade_keeps_every_entry_chain_set_and_metric(older, base, new_pupil):
    with older.place.sql() as connection:
        before = connection.execute(text("SELECT * FROM entries ORDER BY id")).all()
    assert older.upgrade() == ("0002", "0003")
    with closing(older.place.open()) as opened:
        assert differences(opened) == []
        entries = opened.list()
        assert [(entry.task, entry.version, entry.parent_id) for entry in entries] == list(ENTRIES)
        assert [entry.parent for entry in entries] == [None, "sst2@1", "qnli@1", None]
        assert [entry.reference for entry in opened.chain(entries[2])] == ["sst2@1", "qnli@1", "sst2@2"]
        for entry, neurons, row in zip(entries, older.neurons, before, strict=True):
            assert opened.neurons(entry) == neurons
            assert opened.overlay(entry).neurons == neurons
            assert (entry.metrics, entry.method, entry.seed) == (METRICS, {"name": "method"}, 2**40)
            assert (entry.reused_from, entry.forgets) == (None, None)
            assert entry.created_at.isoformat() == f"2026-01-0{entry.id}T12:30:00+00:00"
            for name in ("input_digest", "data_fingerprint", "state_digest", "space_fingerprint"):
                assert getattr(entry, name) == getattr(row, name)
            assert (entry.overlay_file.sha256, entry.overlay_file.bytes) == (row.overlay_sha256, row.overlay_bytes)
        with older.place.sql() as connection:
            found = connection.execute(text("SELECT entry_id, name, value FROM entry_metrics ORDER BY 1, 2")).all()
            assert found == [(entry.id, name, value) for entry in entries for name, value in sorted(FLAT.items())]
            assert connection.scalar(text("SELECT count(*) FROM neuron_spaces")) == 1
        opened.set_alias("sst2@1", "champion")
        assert opened.get("sst2@champion") == entries[0]
        pupil = new_pupil(opened, base)
        assert pupil.record("new").version == 1  # ids go on where they were


CHANGES = (
    "UPDATE entries SET stream = 'changed'",
    "DELETE FROM entries",
    "UPDATE neuron_sets SET bitmap = bitmap",
    "DELETE FROM neuron_sets",
    "UPDATE neuron_spaces SET neurons = 1",
    "DELETE FROM neuron_spaces",
)
ONLY = {
    "sqlite": [
        f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}" for table in ("entries", "neuron_sets", "neuron_spaces")
    ],
    "postgresql": [f"TRUNCATE {table} CASCADE" for table in ("entries", "neuron_sets", "neuron_spaces")],
}


def check_unchangeable(place: Place) -> None:
    before = dump(place)
    for statement in (*CHANGES, *ONLY[place.kind]):
        with place.sql() as connection, pytest.raises(DBAPIError, match="an entry is immutable"):
            connection.exec_driver_sql(statement)
    assert dump(place) == before


def test_what_is_recorded_cannot_be_changed_by_sql(student, place):
    student.record("sst2")
    check_unchangeable(place)


def test_what_was_upgraded_cannot_be_changed_by_sql(older):
    older.upgrade()
    check_unchangeable(older.place)


def test_an_upgrade_that_lacks_a_file_changes_nothing(older):
    path = FolderStore(older.place.artifacts).path(older.files[2].sha256)
    content = path.read_bytes()
    path.unlink()
    before = dump(older.place)
    with pytest.raises(FailedError, match=rf"^the neurons of entry 3, {path}, is missing; restore the file") as caught:
        older.upgrade()
    assert "\n" not in str(caught.value)
    path.write_bytes(content[:-1])
    with pytest.raises(FailedError, match=r"the neurons of entry 3, .* is truncated"):
        older.upgrade()
    assert dump(older.place) == before
    path.write_bytes(content)
    assert older.upgrade() == ("0002", "0003")


def test_an_upgrade_of_what_is_up_to_date_changes_nothing(older):
    older.upgrade()
    before = dump(older.place)
    assert older.upgrade() == ("0003", "0003")
    assert dump(older.place) == before


def test_an_upgrade_that_is_killed_changes_nothing(older):
    before = dump(older.place)

    def upgrade_and_die() -> None:
        event.listen(Engine, "commit", die)
        older.upgrade()

    assert is_killed(upgrade_and_die)
    assert dump(older.place) == before
    assert older.upgrade() == ("0002", "0003")


def test_an_upgrade_by_several_at_once(older):
    at_once([older.upgrade] * 3)
    with closing(older.place.open()) as opened:
        assert [opened.neurons(entry) for entry in opened.list()] == list(older.neurons)


def test_an_upgrade_of_nothing_makes_the_registry(bare_place):
    assert Registry.upgrade(**bare_place.arguments) == (None, "0003")
    with closing(bare_place.open()) as opened:
        assert opened.list() == []


def test_a_newer_registry_is_refused(place):
    place.open().close()
    with place.sql() as connection:
        connection.execute(text(f"UPDATE {registry.database.VERSION_TABLE} SET version_num = '9999'"))
    try:
        for call in (place.open, lambda: Registry.upgrade(**place.arguments)):
            with pytest.raises(FailedError, match=r"has schema 9999, which this neft, .*: a newer neft wrote it"):
                call()
    finally:
        with place.sql() as connection:
            connection.execute(text(f"UPDATE {registry.database.VERSION_TABLE} SET version_num = '0003'"))


def test_what_a_later_code_calls_older_is_refused(place, tmp_path, monkeypatch):
    place.open().close()
    later = shutil.copytree(registry.database._MIGRATIONS, tmp_path / "migrations")
    (later / "versions" / "0004_later.py").write_text(
        "revision = '0004'\ndown_revision = '0003'\n\n\ndef upgrade() -> None:\n    pass\n"
    )
    monkeypatch.setattr(registry.database, "_MIGRATIONS", later)
    with pytest.raises(FailedError, match="has schema 0003, older than this neft's 0004; run `neft registry upgrade`"):
        place.open()


def test_another_programs_database_is_refused(bare_place):
    bare_place.artifacts.mkdir(parents=True)
    with bare_place.sql() as connection:
        connection.exec_driver_sql("CREATE TABLE runs (run_uuid TEXT)")
    try:
        for call in (bare_place.open, lambda: Registry.upgrade(**bare_place.arguments)):
            with pytest.raises(InputError, match=r"another program's tables \(runs\)"):
                call()
    finally:
        with bare_place.sql() as connection:
            connection.exec_driver_sql("DROP TABLE runs")
