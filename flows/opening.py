"""Opening: a stream's run in the registry and in MLflow, begun anew or gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from flows.failures import skipped_in
from flows.identity import evaluation_of
from flows.progress import say
from flows.setting import Setting
from flows.tracking import Tracker, library_versions
from registry import Entry, Registry, Run
from registry.proposals import eligible


@dataclass(frozen=True)
class Opened:
    """A run that tasks can be recorded in, and the entries that they may start from."""

    run: Run
    sources: Sequence[Entry]


@dataclass(frozen=True)
class Opening:
    """What a run is opened with: its setting, its identity, where it is recorded, and the flow that it is part of."""

    setting: Setting
    identity: str
    registry: Registry
    tracker: Tracker
    flow_run_id: str | None

    def finished(self) -> Run | None:
        """The run that has learnt this very stream already, if there is one."""
        return self.registry.finished_run(self.setting.config.stream, self.identity)

    def open(self, model: PreTrainedModel) -> Opened:
        """Begin the run, or go on with it where it stopped.

        Args:
            model: the untouched base model.
        """
        setting, config = self.setting, self.setting.config
        self.registry.add_base_model(
            setting.base,
            config.model.name,
            config.model.dtype,
            json.loads(model.config.to_json_string()),
            setting.space.model_parameters,
        )
        left = self.registry.unfinished_run(config.stream, self.identity)
        if left is not None:
            say(f"going on with run {left.id} of stream {config.stream!r}, which stopped before its end")
        last = self._last_entry(left)
        sources = self._sources(last)
        # The registry comes first: an MLflow run that it does not know would stay open for ever.
        run = left or self.registry.start_run(
            stream=config.stream,
            config_digest=self.identity,
            config=config.model_dump(mode="json"),
            tasks=[task.name for task in setting.tasks],
        )
        return Opened(self._track(run, left, last), sources)

    def _track(self, run: Run, left: Run | None, last: int) -> Run:
        """Begin the MLflow run, and let the registry know it."""
        recorded = {entry.mlflow_run_id for entry in self.registry.list(run.stream) if entry.mlflow_run_id}
        recorded |= {each.mlflow_run_id for each in skipped_in(run) if each.mlflow_run_id}
        run_id = self.tracker.start(
            run.stream, self._params(), self._tags(), left.mlflow_run_id if left else None, recorded
        )
        known = {"uri": self.tracker.uri, "experiment_id": self.tracker.experiment_id, "last_entry": last}
        return self.registry.update_run(
            run.id,
            status="running",
            mlflow_run_id=run_id,
            tracking={**(run.tracking or {}), **known},
            prefect_flow_run_id=self.flow_run_id,
        )

    def _last_entry(self, left: Run | None) -> int:
        """Id of the last entry that was there when the run first began."""
        known = (left.tracking or {}) if left is not None else {}
        last: int = known.get("last_entry", max((entry.id for entry in self.registry.list()), default=0))
        return last

    def _sources(self, last: int) -> Sequence[Entry]:
        setting, source = self.setting, self.setting.config.method.transfer.source
        if source == "none":
            return ()
        return eligible(self.registry, setting.config.stream, setting.base, setting.space, last, source)

    def _params(self) -> dict[str, Any]:
        setting, config = self.setting, self.setting.config
        named = {f"method.{key}": value for key, value in config.method.model_dump(mode="json").items()}
        named |= {f"training.{key}": value for key, value in config.training.model_dump(mode="json").items()}
        named |= {f"evaluation.{key}": value for key, value in evaluation_of(config).items()}
        # What chance gives, for whoever reads MLflow alone.
        named |= {f"majority.{task.name}": task.majority for task in setting.tasks if task.majority is not None}
        return named | {
            "stream": config.stream,
            "model.name": config.model.name,
            "model.dtype": config.model.dtype,
            "tasks": ", ".join(task.name for task in setting.tasks),
            "seed": config.seed,
        }

    def _tags(self) -> dict[str, str]:
        config = self.setting.config
        versions = {f"neft.version.{name}": number for name, number in library_versions().items()}
        known = {
            "neft.stream": config.stream,
            "neft.seed": str(config.seed),
            "neft.base_model": self.setting.base,
            "neft.config_digest": self.identity,
            "neft.prefect_flow_run": self.flow_run_id or "",
        }
        return versions | known | config.tracking.tags
