"""What the registry takes and gives: frozen values, detached from any database session."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, cast

from neft.errors import InputError
from registry.artifacts import Artifact
from registry.schema import BaseModelRow, EntryRow, EvaluationRow, RunRow
from registry.text import check_name

if TYPE_CHECKING:
    from neft.memory import Memory
    from neft.models import Dtype
    from neft.neurons import NeuronSet
    from neft.overlay import Overlay
    from neft.routing import Signature
    from neft.scoring import Scores

Status = Literal["running", "finished", "failed"]

_LONGEST_METRIC = 500


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among an entry's metrics, by the names that a search knows them by.

    A number in a mapping has the mapping's name before its own: `continual/forgetting`, `scores/bbc-topic`. What no
    index could hold is left out: a name of more than 500 characters, and an integer beyond all floats.
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in flat_metrics(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            found[name] = float(value)
    return {name: value for name, value in found.items() if len(name) <= _LONGEST_METRIC}


@dataclass(frozen=True)
class BaseModel:
    """A base model: the fingerprint of its weights and config, and where it was loaded from, in which dtype."""

    fingerprint: str
    name: str
    dtype: Dtype
    config: Mapping[str, Any]
    parameters: int

    @classmethod
    def from_row(cls, row: BaseModelRow) -> BaseModel:
        return cls(row.fingerprint, row.name, cast("Dtype", row.dtype), row.config, row.parameters)


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """All that is recorded of a task that has been learnt.

    Attributes:
        task: the task's name, as `registry.text.check_name` has it: printable, without `@` and `/`.
        base_model: fingerprint of the base model.
        parent: the entry it was built on, or its id; None for the first of a chain.
        reused_from: the entry that its rows or neurons were taken from, or its id, if any.
        forgets: the entry of its chain that it takes out, or its id, if it does.
        input_digest: SHA-256 of all that decides the result (model, data, method, seed, parent).
        method: kinds, scorer, budget, selection, protection.
        state_digest: `neft.audit.state_digest` of the model with the overlay laid on.
        versions: the library versions it was made with.
        memory: what the protection policy keeps of the task, if anything.
        signature: what tells the task's inputs from others, if it was made.
    """

    task: str
    stream: str
    base_model: str
    parent: Entry | int | None
    input_digest: str
    seed: int
    data_fingerprint: str
    method: Mapping[str, Any]
    training: Mapping[str, Any]
    neurons: NeuronSet
    overlay: Overlay
    scores: Scores | None
    state_digest: str
    metrics: Mapping[str, Any]
    audit: Mapping[str, Any]
    versions: Mapping[str, str]
    mlflow_run_id: str | None = None
    prefect_flow_run_id: str | None = None
    memory: Memory | None = None
    signature: Signature | None = None
    reused_from: Entry | int | None = None
    forgets: Entry | int | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: a name that cannot be looked up, an overlay of another neuron set, or scores of another space.
        """
        check_name("task name", self.task)
        check_name("stream name", self.stream)
        if self.overlay.neurons != self.neurons:
            raise InputError(f"the overlay of task {self.task!r} belongs to another neuron set than the one given")
        if self.scores is not None:
            self.neurons.check_space(self.scores.space)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One version of a task's neuron set and overlay, as recorded. It never changes.

    `parent` is its parent's reference, `task@version`; so are `reused_from`, the entry that its rows or neurons were
    taken from, and `forgets`, the entry of its chain that it takes out. `overlay_file` and the like name what is in the
    artifact store; `Registry.scores`, `.overlay`, `.memory` and `.signature` read them, and `Registry.neurons` the set.
    """

    id: int
    task: str
    version: int
    stream: str
    base_model: BaseModel = field(repr=False)
    parent_id: int | None
    parent: str | None
    reused_from: str | None
    forgets: str | None
    input_digest: str
    seed: int
    data_fingerprint: str
    method: Mapping[str, Any]
    training: Mapping[str, Any]
    scores_file: Artifact | None
    overlay_file: Artifact
    memory_file: Artifact | None
    signature_file: Artifact | None
    neuron_count: int
    parameter_count: int
    space_fingerprint: str
    state_digest: str
    metrics: Mapping[str, Any]
    audit: Mapping[str, Any]
    mlflow_run_id: str | None
    prefect_flow_run_id: str | None
    versions: Mapping[str, str]
    created_at: datetime

    @property
    def reference(self) -> str:
        """How the entry is written: `task@version`."""
        return f"{self.task}@{self.version}"

    @classmethod
    def from_row(cls, row: EntryRow) -> Entry:
        return cls(
            id=row.id,
            task=row.task.name,
            version=row.version,
            stream=row.stream,
            base_model=BaseModel.from_row(row.task.base_model),
            parent_id=row.parent_id,
            parent=row.parent,
            reused_from=row.reused_from,
            forgets=row.forgets,
            input_digest=row.input_digest,
            seed=row.seed,
            data_fingerprint=row.data_fingerprint,
            method=row.method,
            training=row.training,
            scores_file=_optional("scores", row.scores_sha256, row.scores_bytes),
            overlay_file=Artifact("overlay", row.overlay_sha256, row.overlay_bytes),
            memory_file=_optional("memory", row.memory_sha256, row.memory_bytes),
            signature_file=_optional("signature", row.signature_sha256, row.signature_bytes),
            neuron_count=row.neuron_count,
            parameter_count=row.parameter_count,
            space_fingerprint=row.space_fingerprint,
            state_digest=row.state_digest,
            metrics=row.metrics,
            audit=row.audit,
            mlflow_run_id=row.mlflow_run_id,
            prefect_flow_run_id=row.prefect_flow_run_id,
            versions=row.versions,
            created_at=row.created_at,
        )

    @property
    def files(self) -> tuple[Artifact, ...]:
        """All that the entry has in the artifact store."""
        found = (self.overlay_file, self.scores_file, self.memory_file, self.signature_file)
        return tuple(file for file in found if file is not None)

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON has it."""
        return asdict(self) | {"reference": self.reference, "created_at": self.created_at.isoformat()}


def learnt_of(chain: Sequence[Entry]) -> Sequence[Entry]:
    """The entries of a chain whose task its last state has: without those that were forgotten, and what forgets them.

    Args:
        chain: as `Registry.chain` gives it.
    """
    forgotten = {entry.forgets for entry in chain if entry.forgets is not None}
    return [entry for entry in chain if entry.forgets is None and entry.reference not in forgotten]


def _optional(name: str, sha256: str | None, size: int | None) -> Artifact | None:
    return None if sha256 is None or size is None else Artifact(name, sha256, size)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A metric's value for one state of all weights on one evaluation's data."""

    state_digest: str
    data_digest: str
    task: str
    metric: str
    value: float
    examples: int
    details: Mapping[str, Any]
    created_at: datetime

    @classmethod
    def from_row(cls, row: EvaluationRow) -> Evaluation:
        return cls(
            state_digest=row.state_digest,
            data_digest=row.data_digest,
            task=row.task,
            metric=row.metric,
            value=row.value,
            examples=row.examples,
            details=row.details,
            created_at=row.created_at,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a stream. `tracking` says where MLflow keeps it; `finished_at` is None while it is running."""

    id: int
    stream: str
    config_digest: str
    config: Mapping[str, Any]
    status: Status
    tasks: Sequence[str]
    matrix: Mapping[str, Any] | None
    metrics: Mapping[str, Any] | None
    mlflow_run_id: str | None
    tracking: Mapping[str, Any] | None
    prefect_flow_run_id: str | None
    error: str | None
    started_at: datetime
    finished_at: datetime | None

    @classmethod
    def from_row(cls, row: RunRow) -> Run:
        return cls(
            id=row.id,
            stream=row.stream,
            config_digest=row.config_digest,
            config=row.config,
            status=cast("Status", row.status),
            tasks=row.tasks,
            matrix=row.matrix,
            metrics=row.metrics,
            mlflow_run_id=row.mlflow_run_id,
            tracking=row.tracking,
            prefect_flow_run_id=row.prefect_flow_run_id,
            error=row.error,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON has it."""
        finished = self.finished_at.isoformat() if self.finished_at else None
        return asdict(self) | {"started_at": self.started_at.isoformat(), "finished_at": finished}
