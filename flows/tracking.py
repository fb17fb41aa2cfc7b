"""Tracking: a stream run and its tasks in MLflow, under names that its screens compare well."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_SOURCE_NAME
from sqlalchemy.exc import SQLAlchemyError

from neft.errors import RecordError
from neft.neurons import NeuronSet
from neft.tasks import Task

#: Libraries whose versions decide what a run computes.
LIBRARIES = ("neft", "torch", "transformers", "peft", "trl", "datasets", "mlflow", "prefect", "numpy")

_TASK_TAG = "neft.task"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide what a run computes."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


class Tracker:
    """One stream run in MLflow: a parent run, and a child run for each task.

    Every method raises RecordError, which names the store, when MLflow fails.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None):
        """
        Args:
            artifacts: folder of the experiment's artefacts, for a store without a server.
        """
        self.uri, self.experiment = uri, experiment
        with self._said():
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            if found is not None:
                self.experiment_id = found.experiment_id
            else:
                location = (artifacts / experiment).as_uri() if artifacts else None
                self.experiment_id = self._client.create_experiment(experiment, artifact_location=location)
        self.run_id = ""

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RecordError(
                f"MLflow at {self.uri} failed: {reason}; mend it and run again, what is recorded is not learnt again"
            ) from error

    def start(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        resumed: str | None = None,
        recorded: Set[str] = frozenset(),
    ) -> str:
        """Begin the parent run, or go on with the one that was left unfinished.

        Args:
            resumed: the run to go on with, if it is still there and of this experiment.
            recorded: runs of tasks that are recorded, and so are kept.
        """
        with self._said():
            if resumed is not None and self._is_ours(resumed):
                self.run_id = resumed
                self._client.update_run(self.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
                self._drop_torn_tasks(recorded)
            else:
                self.run_id = self._create(name, tags)
                self._log_params(self.run_id, params)
        return self.run_id

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        # The context adds the user and, in a git checkout, the commit.
        own = resolve_tags() | {MLFLOW_RUN_NAME: name, MLFLOW_SOURCE_NAME: "neft", "neft.code_version": version("neft")}
        # Over HTTP MLflow takes text alone as a tag's value.
        texts = {key: str(value) for key, value in (own | dict(tags)).items()}
        return self._client.create_run(self.experiment_id, tags=texts).info.run_id

    def _is_ours(self, run_id: str) -> bool:
        return bool(self._client.search_runs([self.experiment_id], f"attributes.run_id = '{run_id}'"))

    def _drop_torn_tasks(self, recorded: Set[str]) -> None:
        """A task that is not recorded is learnt anew in a child run of its own; the old one would stand beside it."""
        children = self._client.search_runs([self.experiment_id], f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{self.run_id}'")
        for child in children:
            if child.info.run_id not in recorded:
                self._client.delete_run(child.info.run_id)

    def close_recorded(self, run_id: str | None) -> None:
        """End the run of a task that was recorded, if the process was killed before it could."""
        with self._said():
            left = self._client.search_runs(
                [self.experiment_id], f"attributes.run_id = '{run_id}' AND attributes.status != 'FINISHED'"
            )
        for run in left:
            self.finish(run.info.run_id)

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        self._client.log_batch(run_id, params=[Param(key, str(value)[:6000]) for key, value in params.items()])

    def start_task(self, task: Task, params: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        """Begin a task's child run, with its data as inputs."""
        with self._said():
            run_id = self._create(task.name, {MLFLOW_PARENT_RUN_ID: self.run_id, _TASK_TAG: task.name} | dict(tags))
            self._log_params(run_id, params)
            self._client.log_inputs(
                run_id,
                datasets=[
                    _dataset(f"{task.name}/train", task.train_fingerprint, "training"),
                    _dataset(f"{task.name}/eval", task.eval_fingerprint, "evaluation"),
                ],
            )
        return run_id

    def log(self, run_id: str, metrics: Mapping[str, float], step: int) -> None:
        """Log several metrics at one step."""
        now = int(time.time() * 1000)
        with self._said():
            self._client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])

    def log_row(self, metrics: Mapping[str, float], learnt: int) -> None:
        """Log a row of the R matrix and what follows from it, on the parent, unless it was before a restart."""
        with self._said():
            known = next(iter(metrics))
            logged = {metric.step for metric in self._client.get_metric_history(self.run_id, known)}
        if learnt not in logged:
            self.log(self.run_id, metrics, learnt)

    def log_neurons(self, run_id: str, neurons: NeuronSet) -> None:
        """Keep the neuron-set file as an artefact of the task's run."""
        with self._said(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "neurons.safetensors"
            neurons.save(path)
            self._client.log_artifact(run_id, str(path))

    def log_table(self, run_id: str, table: Mapping[str, Sequence[Any]], name: str) -> None:
        """Keep a table, by its columns, as an artefact of a run."""
        with self._said():
            self._client.log_table(run_id, dict(table), name)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Keep a picture as an artefact of the parent run."""
        with self._said():
            self._client.log_figure(self.run_id, figure, name)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        with self._said():
            self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def finish(self, run_id: str, finished: bool = True) -> None:
        """End a run, as finished or failed."""
        status = RunStatus.FINISHED if finished else RunStatus.FAILED
        with self._said():
            self._client.set_terminated(run_id, RunStatus.to_string(status))


def _dataset(name: str, fingerprint: str, context: str) -> DatasetInput:
    """A data set as MLflow knows it; its source is what identifies it: the fingerprint of its rendered rows."""
    source = json.dumps({"fingerprint": fingerprint})
    dataset = Dataset(name=name, digest=fingerprint[:16], source_type="fingerprint", source=source)
    return DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", context)])
