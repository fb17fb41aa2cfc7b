"""The tables. An entry, once written, never changes: the ORM refuses here, and the database itself by triggers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    cast,
    event,
    select,
)
from sqlalchemy.orm import (
    ColumnProperty,
    DeclarativeBase,
    Mapped,
    Mapper,
    aliased,
    column_property,
    mapped_column,
    relationship,
)

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
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("entries.id"), index=True)
    reused_from_id: Mapped[int | None] = mapped_column(ForeignKey("entries.id"))
    forgets_id: Mapped[int | None] = mapped_column(ForeignKey("entries.id"))
    stream: Mapped[str] = mapped_column(index=True)
    input_digest: Mapped[str] = mapped_column(index=True, unique=True)
    seed: Mapped[int] = mapped_column(BigInteger)
    data_fingerprint: Mapped[str]
    method: Mapped[dict[str, Any]]
    training: Mapped[dict[str, Any]]
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

    if TYPE_CHECKING:
        # References, `task@version`, of the entries that three columns above name; set below.
        parent: Mapped[str | None]
        reused_from: Mapped[str | None]
        forgets: Mapped[str | None]


def _reference_of(entry_id: Any) -> ColumnProperty[str]:
    """The reference of the entry of that id, read with the row: its whole row is not needed."""
    other = aliased(EntryRow)
    written = TaskRow.name + "@" + cast(other.version, String)
    query = select(written).join_from(other, TaskRow, other.task_id == TaskRow.id).where(other.id == entry_id)
    return column_property(query.correlate(EntryRow).scalar_subquery())


EntryRow.parent = _reference_of(EntryRow.parent_id)  # type: ignore[assignment]
EntryRow.reused_from = _reference_of(EntryRow.reused_from_id)  # type: ignore[assignment]
EntryRow.forgets = _reference_of(EntryRow.forgets_id)  # type: ignore[assignment]


class NeuronSpaceRow(Base):
    """A neuron space: what the numbers in a bitmap mean."""

    __tablename__ = "neuron_spaces"

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    description: Mapped[dict[str, Any]]
    neurons: Mapped[int] = mapped_column(BigInteger)


class NeuronSetRow(Base):
    """The neurons of an entry, as `registry.bitmaps` writes them. Apart from the entry, since few look-ups need it."""

    __tablename__ = "neuron_sets"

    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id"), primary_key=True)
    space_fingerprint: Mapped[str] = mapped_column(ForeignKey("neuron_spaces.fingerprint"), index=True)
    bitmap: Mapped[bytes] = mapped_column(LargeBinary)


class MetricRow(Base):
    """One number among an entry's metrics, so that entries can be searched by it."""

    __tablename__ = "entry_metrics"
    __table_args__ = (Index(None, "name", "value"),)

    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class AliasRow(Base):
    """A movable name for one of a task's entries."""

    __tablename__ = "aliases"

    task_id: Mapped[int] = mapped_column(ForeignKey("tasks.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id"), index=True)
    moved_at: Mapped[datetime] = mapped_column(default=now)


class TagRow(Base):
    """What somebody has noted on an entry under a key."""

    __tablename__ = "entry_tags"

    entry_id: Mapped[int] = mapped_column(ForeignKey("entries.id"), primary_key=True)
    #: Without the value in its index, for PostgreSQL has no room there for a long one.
    key: Mapped[str] = mapped_column(primary_key=True, index=True)
    value: Mapped[str]


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


@event.listens_for(NeuronSetRow, "before_update")
@event.listens_for(NeuronSetRow, "before_delete")
def _refuse_other_neurons(mapper: Mapper[NeuronSetRow], connection: object, row: NeuronSetRow) -> None:
    raise FailedError(f"the neurons of entry {row.entry_id} are immutable; record a new version")
