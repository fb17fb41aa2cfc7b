"""Neuron sets as bitmaps in the database; aliases, tags, metrics to search by; what an entry reuses, and what it takes
out.

The sets of entries that are there already are read from their files, so that a store without one stops the upgrade.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import context, op

from neft.errors import FailedError

revision = "0003"
down_revision = "0002"

_IMMUTABLE = "an entry is immutable"


def _sqlite_triggers(table: str, key: str) -> Sequence[str]:
    refuse = f"BEGIN SELECT RAISE(ABORT, '{_IMMUTABLE}'); END"
    there = f"EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key})"
    return (
        f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {refuse}",
        f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} {refuse}",
        # INSERT OR REPLACE deletes rows without a word to the trigger above.
        f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN {there} {refuse}",
    )


def _postgresql_triggers(table: str, key: str) -> Sequence[str]:
    refuse = "EXECUTE FUNCTION entries_refuse_change()"
    return (
        f"CREATE TRIGGER {table}_no_change BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW {refuse}",
        f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT {refuse}",
    )


def upgrade() -> None:
    _create_sets()
    _create_labels()
    _add_links()
    _fill()
    # SQLite drops a column without making the table anew, which would lose its triggers.
    for name in ("neurons_sha256", "neurons_bytes"):
        op.drop_column("entries", name)
    triggers = {"sqlite": _sqlite_triggers, "postgresql": _postgresql_triggers}[op.get_bind().dialect.name]
    for table, key in (("neuron_sets", "entry_id"), ("neuron_spaces", "fingerprint")):
        for trigger in triggers(table, key):
            op.execute(trigger)


def _create_sets() -> None:
    op.create_table(
        "neuron_spaces",
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("description", sa.JSON, nullable=False),
        sa.Column("neurons", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name="pk_neuron_spaces"),
    )
    op.create_table(
        "neuron_sets",
        sa.Column("entry_id", sa.Integer, nullable=False),
        sa.Column("space_fingerprint", sa.String, nullable=False),
        sa.Column("bitmap", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("entry_id", name="pk_neuron_sets"),
        sa.ForeignKeyConstraint(["entry_id"], ["entries.id"], name="fk_neuron_sets_entry_id_entries"),
        sa.ForeignKeyConstraint(
            ["space_fingerprint"], ["neuron_spaces.fingerprint"], name="fk_neuron_sets_space_fingerprint_neuron_spaces"
        ),
    )
    op.create_index("ix_neuron_sets_space_fingerprint", "neuron_sets", ["space_fingerprint"])


def _create_labels() -> None:
    op.create_table(
        "entry_metrics",
        sa.Column("entry_id", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("entry_id", "name", name="pk_entry_metrics"),
        sa.ForeignKeyConstraint(["entry_id"], ["entries.id"], name="fk_entry_metrics_entry_id_entries"),
    )
    op.create_index("ix_entry_metrics_name_value", "entry_metrics", ["name", "value"])
    op.create_table(
        "aliases",
        sa.Column("task_id", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("entry_id", sa.Integer, nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "name", name="pk_aliases"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_aliases_task_id_tasks"),
        sa.ForeignKeyConstraint(["entry_id"], ["entries.id"], name="fk_aliases_entry_id_entries"),
    )
    op.create_index("ix_aliases_entry_id", "aliases", ["entry_id"])
    op.create_table(
        "entry_tags",
        sa.Column("entry_id", sa.Integer, nullable=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("value", sa.String, nullable=False),
        sa.PrimaryKeyConstraint("entry_id", "key", name="pk_entry_tags"),
        sa.ForeignKeyConstraint(["entry_id"], ["entries.id"], name="fk_entry_tags_entry_id_entries"),
    )
    op.create_index("ix_entry_tags_key", "entry_tags", ["key"])


def _add_links() -> None:
    for name in ("reused_from_id", "forgets_id"):
        constraint = f"CONSTRAINT fk_entries_{name}_entries REFERENCES entries (id)"
        op.execute(f"ALTER TABLE entries ADD COLUMN {name} INTEGER {constraint}")
    op.create_index("ix_entries_parent_id", "entries", ["parent_id"])


def _fill() -> None:
    """Give the entries that are there their bitmaps and their metrics to search by."""
    connection = op.get_bind()
    rows = connection.execute(
        sa.text("SELECT id, neurons_sha256, neurons_bytes, metrics FROM entries ORDER BY id")
    ).all()
    if not rows:
        return
    from neft.neurons import NeuronSet
    from registry.artifacts import Artifact
    from registry.bitmaps import bitmap_of, written
    from registry.records import flat_metrics

    store = context.config.attributes.get("artifacts")
    if store is None:
        raise FailedError("the upgrade reads the entries' neurons from their files; name the registry's folder of them")
    for entry_id, sha256, size, metrics in rows:
        neurons = NeuronSet.load(store.fetch(Artifact("neurons", sha256, size), f"entry {entry_id}"))
        space = neurons.space
        known = sa.text("SELECT 1 FROM neuron_spaces WHERE fingerprint = :fingerprint")
        if connection.execute(known, {"fingerprint": space.fingerprint}).first() is None:
            connection.execute(
                sa.text("INSERT INTO neuron_spaces VALUES (:fingerprint, :description, :neurons)"),
                {
                    "fingerprint": space.fingerprint,
                    "description": json.dumps(space.to_dict()),
                    "neurons": len(space),
                },
            )
        connection.execute(
            sa.text("INSERT INTO neuron_sets VALUES (:entry, :space, :bitmap)"),
            {"entry": entry_id, "space": space.fingerprint, "bitmap": written(bitmap_of(neurons))},
        )
        found = flat_metrics(json.loads(metrics) if isinstance(metrics, str) else metrics)
        for name, value in found.items():
            connection.execute(
                sa.text("INSERT INTO entry_metrics VALUES (:entry, :name, :value)"),
                {"entry": entry_id, "name": name, "value": value},
            )
