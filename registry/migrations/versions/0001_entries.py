"""Base models, tasks, immutable entries, evaluations and runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_IMMUTABLE = "an entry is immutable"

_SQLITE_TRIGGERS = (
    f"""
    CREATE TRIGGER entries_no_update BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, '{_IMMUTABLE}'); END
    """,
    f"""
    CREATE TRIGGER entries_no_delete BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, '{_IMMUTABLE}'); END
    """,
    # INSERT OR REPLACE deletes rows without a word to the trigger above.
    f"""
    CREATE TRIGGER entries_no_replace BEFORE INSERT ON entries
    WHEN EXISTS (
        SELECT 1 FROM entries
        WHERE id = NEW.id OR input_digest = NEW.input_digest OR (task_id = NEW.task_id AND version = NEW.version)
    )
    BEGIN SELECT RAISE(ABORT, '{_IMMUTABLE}'); END
    """,
)
_POSTGRESQL_TRIGGERS = (
    f"""
    CREATE FUNCTION entries_refuse_change() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION '{_IMMUTABLE}' USING ERRCODE = 'restrict_violation'; END $$
    """,
    """
    CREATE TRIGGER entries_no_change BEFORE UPDATE OR DELETE ON entries
    FOR EACH ROW EXECUTE FUNCTION entries_refuse_change()
    """,
    """
    CREATE TRIGGER entries_no_truncate BEFORE TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION entries_refuse_change()
    """,
)


def upgrade() -> None:
    _create_models_and_tasks()
    _create_entries()
    _create_evaluations()
    _create_runs()
    triggers = {"sqlite": _SQLITE_TRIGGERS, "postgresql": _POSTGRESQL_TRIGGERS}[op.get_bind().dialect.name]
    for trigger in triggers:
        op.execute(trigger)


def _create_models_and_tasks() -> None:
    op.create_table(
        "base_models",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("dtype", sa.String, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_base_models"),
        sa.UniqueConstraint("fingerprint", name="uq_base_models_fingerprint"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("base_model_id", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
        sa.UniqueConstraint("name", "base_model_id", name="uq_tasks_name_base_model_id"),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name="fk_tasks_base_model_id_base_models"),
    )


def _create_entries() -> None:
    op.create_table(
        "entries",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("task_id", sa.Integer, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("parent_id", sa.Integer, nullable=True),
        sa.Column("stream", sa.String, nullable=False),
        sa.Column("input_digest", sa.String, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("data_fingerprint", sa.String, nullable=False),
        sa.Column("method", sa.JSON, nullable=False),
        sa.Column("training", sa.JSON, nullable=False),
        sa.Column("neurons_sha256", sa.String, nullable=False),
        sa.Column("neurons_bytes", sa.BigInteger, nullable=False),
        sa.Column("scores_sha256", sa.String, nullable=True),
        sa.Column("scores_bytes", sa.BigInteger, nullable=True),
        sa.Column("overlay_sha256", sa.String, nullable=False),
        sa.Column("overlay_bytes", sa.BigInteger, nullable=False),
        sa.Column("neuron_count", sa.BigInteger, nullable=False),
        sa.Column("parameter_count", sa.BigInteger, nullable=False),
        sa.Column("space_fingerprint", sa.String, nullable=False),
        sa.Column("state_digest", sa.String, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("audit", sa.JSON, nullable=False),
        sa.Column("mlflow_run_id", sa.String, nullable=True),
        sa.Column("prefect_flow_run_id", sa.String, nullable=True),
        sa.Column("versions", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_entries"),
        sa.UniqueConstraint("task_id", "version", name="uq_entries_task_id_version"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_entries_task_id_tasks"),
        sa.ForeignKeyConstraint(["parent_id"], ["entries.id"], name="fk_entries_parent_id_entries"),
    )
    op.create_index("ix_entries_stream", "entries", ["stream"])
    op.create_index("ix_entries_input_digest", "entries", ["input_digest"], unique=True)


def _create_evaluations() -> None:
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("state_digest", sa.String, nullable=False),
        sa.Column("data_digest", sa.String, nullable=False),
        sa.Column("task", sa.String, nullable=False),
        sa.Column("metric", sa.String, nullable=False),
        sa.Column("value", sa.Float, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.UniqueConstraint("state_digest", "data_digest", name="uq_evaluations_state_digest_data_digest"),
    )


def _create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("stream", sa.String, nullable=False),
        sa.Column("config_digest", sa.String, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("tasks", sa.JSON, nullable=False),
        sa.Column("matrix", sa.JSON, nullable=True),
        sa.Column("metrics", sa.JSON, nullable=True),
        sa.Column("mlflow_run_id", sa.String, nullable=True),
        sa.Column("tracking", sa.JSON, nullable=True),
        sa.Column("prefect_flow_run_id", sa.String, nullable=True),
        sa.Column("error", sa.String, nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.CheckConstraint("status IN ('running', 'finished', 'failed')", name=op.f("ck_runs_status")),
    )
    op.create_index("ix_runs_stream", "runs", ["stream"])
