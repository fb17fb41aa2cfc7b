"""The ledger: what has been evaluated and run, so that nothing is computed twice and a stopped run can go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from neft.errors import FailedError, InputError, NotFoundError, nearest
from registry.database import Database
from registry.queries import evaluation_row, newest_run_row, run_rows, stream_names
from registry.records import Evaluation, Run, Status
from registry.schema import EvaluationRow, RunRow, now
from registry.text import plain


class Ledger:
    """Evaluations and runs, in a database. Every method raises FailedError when the database fails."""

    def __init__(self, database: Database):
        self._database = database

    def close(self) -> None:
        """Close the connections to the database."""
        self._database.close()

    def record_evaluation(
        self,
        *,
        state_digest: str,
        data_digest: str,
        task: str,
        metric: str,
        value: float,
        examples: int,
        details: Mapping[str, Any],
    ) -> Evaluation:
        """Record a metric's value; where this state has been evaluated on this data already, that one is returned.

        Args:
            state_digest: `neft.audit.state_digest` of the model.
            data_digest: fingerprint of the evaluation's data, metric and settings.
            task: the task that was evaluated.
            metric: its name.
            value: finite.
            examples: how many it was computed from.
            details: whatever else is worth keeping, as JSON.

        Raises:
            FailedError: the value is not finite.
        """
        if not math.isfinite(value):
            raise FailedError(f"{metric} of task {task!r} is {value}, not a finite number; the model may have diverged")

        def work(session: Session) -> Evaluation:
            row = evaluation_row(session, state_digest, data_digest)
            if row is None:
                row = EvaluationRow(
                    state_digest=state_digest,
                    data_digest=data_digest,
                    task=task,
                    metric=metric,
                    value=value,
                    examples=examples,
                    details=plain("details", details),
                )
                session.add(row)
                session.flush()
            return Evaluation.from_row(row)

        return self._database.write(work)

    def evaluation(self, state_digest: str, data_digest: str) -> Evaluation | None:
        """What this state scored on this data, if it has been recorded."""
        with self._database.reading() as session:
            row = evaluation_row(session, state_digest, data_digest)
            return Evaluation.from_row(row) if row else None

    def start_run(
        self,
        *,
        stream: str,
        config_digest: str,
        config: Mapping[str, Any],
        tasks: Sequence[str],
        mlflow_run_id: str | None = None,
        tracking: Mapping[str, Any] | None = None,
        prefect_flow_run_id: str | None = None,
    ) -> Run:
        """Record that a run of a stream has begun.

        Args:
            stream: the stream's name.
            config_digest: SHA-256 of all of the config that decides the result.
            config: the config as it was run, as JSON.
            tasks: the names of its tasks, in order.
            mlflow_run_id: the MLflow run that tracks it.
            tracking: where that MLflow run is kept, as JSON.
            prefect_flow_run_id: the Prefect flow run.
        """
        row = RunRow(
            stream=stream,
            config_digest=config_digest,
            config=plain("config", config),
            status="running",
            tasks=list(tasks),
            mlflow_run_id=mlflow_run_id,
            tracking=plain("tracking", tracking),
            prefect_flow_run_id=prefect_flow_run_id,
        )

        def work(session: Session) -> Run:
            session.add(row)
            session.flush()
            return Run.from_row(row)

        return self._database.write(work)

    def update_run(
        self,
        run_id: int,
        *,
        status: Status | None = None,
        matrix: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        mlflow_run_id: str | None = None,
        tracking: Mapping[str, Any] | None = None,
        prefect_flow_run_id: str | None = None,
        error: str | None = None,
    ) -> Run:
        """Record how a run stands. What is None stays as it is; a `status` says when it ended, and clears the error.

        Raises:
            InputError: there is no such run.
        """
        changes = {
            "matrix": plain("matrix", matrix),
            "metrics": plain("metrics", metrics),
            "mlflow_run_id": mlflow_run_id,
            "tracking": plain("tracking", tracking),
            "prefect_flow_run_id": prefect_flow_run_id,
        }

        def work(session: Session) -> Run:
            row = session.get(RunRow, run_id)
            if row is None:
                raise InputError(f"no run {run_id} in the registry; start one first")
            for name, value in changes.items():
                if value is not None:
                    setattr(row, name, value)
            if status is not None:
                row.status, row.finished_at, row.error = status, None if status == "running" else now(), None
            if error is not None:
                row.error = error
            session.flush()
            return Run.from_row(row)

        return self._database.write(work)

    def unfinished_run(self, stream: str, config_digest: str) -> Run | None:
        """The newest run of this config, when it is not finished: the one to go on with."""
        run = self._newest(stream, config_digest)
        return run if run and run.status != "finished" else None

    def finished_run(self, stream: str, config_digest: str) -> Run | None:
        """The newest finished run of this config."""
        return self._newest(stream, config_digest, "finished")

    def run(self, run_id: int) -> Run:
        """The run of that id.

        Raises:
            InputError: there is none.
        """
        with self._database.reading() as session:
            row = session.get(RunRow, run_id)
            if row is None:
                raise InputError(f"no run {run_id} in the registry; start one first")
            return Run.from_row(row)

    def newest_run(self, stream: str) -> Run:
        """The newest run of a stream, finished or not.

        Raises:
            InputError: the stream has not been run.
        """
        run = self._newest(stream)
        if run is None:
            streams = self.streams()
            hint = nearest(stream, streams) if streams else "nothing has been run yet"
            raise NotFoundError(f"no run of stream {stream!r} in the registry; {hint}")
        return run

    def runs(self, stream: str) -> Sequence[Run]:
        """Every run of a stream, in the order they were started."""
        with self._database.reading() as session:
            return [Run.from_row(row) for row in run_rows(session, stream)]

    def streams(self) -> Sequence[str]:
        """Every stream that has been run, sorted."""
        with self._database.reading() as session:
            return stream_names(session)

    def _newest(self, stream: str, config_digest: str | None = None, status: Status | None = None) -> Run | None:
        with self._database.reading() as session:
            row = newest_run_row(session, stream, config_digest, status)
            return Run.from_row(row) if row else None
