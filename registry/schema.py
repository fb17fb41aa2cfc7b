"""The tables. An entry, once written, never changes: the ORM refuses here, and the database itself by triggers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    MetaData,
    TypeDecorator,
    UniqueConstraint,
    event,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, mapped_column, relationship

from neft.errors import FailedError

#: Names for constraints, the same on every database, so that later migrations can speak of them.
NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite forgets time zones and PostgreSQL answers in its own, so both are brought back here."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    """The present moment, in UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 - as SQLAlchemy reads it
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
    }


class BaseModelRow(Base):
    """A base model, known by the fingerprint of its weights and config."""

    __tablename__ = "base_models"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    dtype: Mapped[str]
    config: Mapped[dict[str, Any]]
    parameters: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(default=now)


class TaskRow(Base):
    """A task, as learnt on one base model; written together with its first entry."""

    __tablename__ = "tasks"
    __table_args__ = (UniqueConstraint("name", "base_model_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    base_model_id: Mapped[int] = mapped_column(ForeignKey("base_models.id"))

    base_model: Mapped[BaseModelRow] = relationship(lazy="joined", innerjoin=True)


class EntryRow(Base):
    """One version of a task's neuron set and overlay."""

    __tablename__ = "entries"
    __table_args__ = (UniqueConstraint("task_id", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"))
    version: Mapped[int]
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("entries.id"))
    stream: Mapped[str] = mapped_column(index=True)
    input_digest: Mapped[str] = mapped_column(index=True, unique=True)
    seed: Mapped[int] = mapped_column(BigInteger)
    data_fingerprint: Mapped[str]
    method: Mapped[dict[str, Any]]
    training: Mapped[dict[str, Any]]
    neurons_sha256: Mapped[str]
    neurons_bytes: Mapped[int] = mapped_column(BigInteger)
    scores_sha256: Mapped[str | None]
    scores_bytes: Mapped[int | None] = mapped_column(BigInteger)
    overlay_sha256: Mapped[str]
    overlay_bytes: Mapped[int] = mapped_column(BigInteger)
    memory_sha256: Mapped[str | None]
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    signature_sha256: Mapped[str | None]
    signature_bytes: Mapped[int | None] = mapped_column(BigInteger)
    neuron_count: Mapped[int] = mapped_column(BigInteger)
    parameter_count: Mapped[int] = mapped_column(BigInteger)
    space_fingerprint: Mapped[str]
    state_digest: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    audit: Mapped[dict[str, Any]]
    mlflow_run_id: Mapped[str | None]
    prefect_flow_run_id: Mapped[str | None]
    versions: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)

    task: Mapped[TaskRow] = relationship(lazy="joined", innerjoin=True)
    parent: Mapped[EntryRow | None] = relationship(remote_side="EntryRow.id", lazy="joined", join_depth=1)


class EvaluationRow(Base):
    """The value of one metric, for one state of all weights on one evaluation's data."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("state_digest", "data_digest"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    state_digest: Mapped[str]
    data_digest: Mapped[str]
    task: Mapped[str]
    metric: Mapped[str]
    value: Mapped[float]
    examples: Mapped[int] = mapped_column(BigInteger)
    details: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class RunRow(Base):
    """One run of a stream, from its start to its end."""

    __tablename__ = "runs"
    __table_args__ = (CheckConstraint("status IN ('running', 'finished', 'failed')", name="status"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    stream: Mapped[str] = mapped_column(index=True)
    config_digest: Mapped[str]
    config: Mapped[dict[str, Any]]
    status: Mapped[str]
    tasks: Mapped[list[str]]
    matrix: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any] | None]
    mlflow_run_id: Mapped[str | None]
    tracking: Mapped[dict[str, Any] | None]
    prefect_flow_run_id: Mapped[str | None]
    error: Mapped[str | None]
    started_at: Mapped[datetime] = mapped_column(default=now)
    finished_at: Mapped[datetime | None]


@event.listens_for(EntryRow, "before_update")
@event.listens_for(EntryRow, "before_delete")
def _refuse_change(mapper: Mapper[EntryRow], connection: object, entry: EntryRow) -> None:
    raise FailedError(f"entry {entry.id} is immutable: it can be neither changed nor deleted; record a new version")
