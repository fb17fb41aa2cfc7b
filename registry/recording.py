"""Recording: the rows of a new entry, in a transaction that the caller opens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyroaring import FrozenBitMap
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.artifacts import Artifact
from registry.bitmaps import written
from registry.queries import base_model_row, locked_task
from registry.records import BaseModel, NewEntry, flat_metrics
from registry.schema import BaseModelRow, EntryRow, MetricRow, NeuronSetRow, NeuronSpaceRow
from registry.text import plain


def recorded_base(session: Session, base: BaseModel) -> BaseModelRow:
    """The row of a base model, which is written if it is new; what was recorded first stays."""
    row = base_model_row(session, base.fingerprint)
    if row is None:
        row = BaseModelRow(
            fingerprint=base.fingerprint,
            name=base.name,
            dtype=base.dtype,
            config=plain("config", base.config),
            parameters=base.parameters,
        )
        session.add(row)
        session.flush()
    return row


def add_entry(
    session: Session,
    base: BaseModelRow,
    task: str,
    columns: Mapping[str, Any],
    space: Mapping[str, Any],
    bitmap: FrozenBitMap,
) -> EntryRow:
    """Write the next version of a task, with its neurons and the metrics that it is searched by.

    Args:
        columns: all columns of the entry but its task and version.
        space: the neuron space, as `NeuronSpace.to_dict` describes it.
    """
    row_of_task = locked_task(session, task, base)
    newest = session.scalar(select(func.max(EntryRow.version)).where(EntryRow.task_id == row_of_task.id))
    row = EntryRow(task=row_of_task, version=(newest or 0) + 1, **columns)
    session.add(row)
    session.flush()
    if session.get(NeuronSpaceRow, row.space_fingerprint) is None:
        neurons = sum(site["size"] for site in space["sites"])
        session.add(NeuronSpaceRow(fingerprint=row.space_fingerprint, description=dict(space), neurons=neurons))
        session.flush()
    session.add(NeuronSetRow(entry_id=row.id, space_fingerprint=row.space_fingerprint, bitmap=written(bitmap)))
    session.add_all(
        MetricRow(entry_id=row.id, name=name, value=value) for name, value in flat_metrics(row.metrics).items()
    )
    return row


def columns_of(new: NewEntry) -> dict[str, Any]:
    """The columns of a new entry that need neither its files nor the database."""
    mappings = {
        name: plain(name, getattr(new, name)) for name in ("method", "training", "metrics", "audit", "versions")
    }
    return mappings | {
        "stream": new.stream,
        "input_digest": new.input_digest,
        "seed": new.seed,
        "data_fingerprint": new.data_fingerprint,
        "neuron_count": len(new.neurons),
        "parameter_count": new.overlay.parameters,
        "space_fingerprint": new.neurons.space.fingerprint,
        "state_digest": new.state_digest,
        "mlflow_run_id": new.mlflow_run_id,
        "prefect_flow_run_id": new.prefect_flow_run_id,
    }


def columns_of_files(files: Mapping[str, Artifact]) -> dict[str, Any]:
    """The columns that name an entry's files: `overlay`, `scores`, `memory` and `signature`, as far as it has them."""
    found: dict[str, Any] = {}
    for name, file in files.items():
        found |= {f"{name}_sha256": file.sha256, f"{name}_bytes": file.bytes}
    return found
