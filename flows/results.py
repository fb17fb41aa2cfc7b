"""A comparison's results, read from MLflow alone, or from a file that keeps them."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from neft.errors import FailedError, InputError, nearest

#: Runs of one page of MLflow's answer.
_PAGE = 200


@dataclass(frozen=True)
class Result:
    """One finished stream run of a comparison.

    `metrics` are MLflow's newest values, by its names, and `perplexity_rise`: the mean over general probes of
    G[T] / G[0] - 1. `rows` is the R matrix, `majority` what the commonest label scores, task by task.
    """

    method: str
    order: str
    seed: int
    rate: float
    tuning: bool
    tasks: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    majority: Mapping[str, float]
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    versions: Mapping[str, str]
    started: int
    run_id: str
    config_digest: str

    @property
    def place(self) -> tuple[str, str, int, float, tuple[str, ...]]:
        """Where the run stands in its comparison: method, order, seed, learning rate and tasks."""
        return self.method, self.order, self.seed, self.rate, self.tasks

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Result:
        rows = tuple(tuple(row) for row in described["rows"])
        return cls(**{**described, "tasks": tuple(described["tasks"]), "rows": rows})


def kept_results(path: Path) -> dict[str, list[Result]]:
    """Comparison -> its runs, from a JSON file that keeps them: `{"comparisons": {NAME: [RUN, ...]}}`.

    Raises:
        InputError: no such file, or it is not of this form.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))["comparisons"]
        return {name: [Result.from_dict(run) for run in runs] for name, runs in described.items()}
    except OSError as error:
        raise InputError(f"results cannot be read from {path}: {error.strerror}; name another file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = ", ".join(field.name for field in fields(Result))
        raise InputError(
            f"{path} keeps no results of comparisons ({type(error).__name__}: {error}); it must be JSON such as "
            f'{{"comparisons": {{"name": [...]}}}}, each run with {wanted}'
        ) from error


def united(kept: Sequence[Result], read: Sequence[Result]) -> list[Result]:
    """The runs of one comparison that were read now, and those that were kept of other machines, as they were begun.

    At a place where both have a run, that which was read now stands, whatever its config and data are.
    """
    places = {result.place for result in read}
    return sorted([*read, *(each for each in kept if each.place not in places)], key=lambda result: result.started)


def read_results(experiment: str, uri: str) -> list[Result]:
    """Every finished run of a comparison, the newest of each name, in the order in which they were begun.

    Raises:
        InputError: no such experiment, or nothing in it belongs to a comparison.
        FailedError: MLflow failed.
    """
    # A bar for each of a hundred small files would bury the report.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = [each.name for each in client.search_experiments()]
            raise InputError(f"no experiment {experiment!r} in MLflow at {uri}; {nearest(experiment, known)}")
        newest: dict[str, Run] = {}
        for run in _runs(client, found.experiment_id):
            if "neft.compare" in run.data.tags:
                newest.setdefault(str(run.info.run_name), run)
        if not newest:
            raise InputError(
                f"experiment {experiment!r} holds no finished run of a comparison; `neft compare` makes some"
            )
        return sorted((_result(client, run) for run in newest.values()), key=lambda result: result.started)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FailedError(f"MLflow at {uri} failed: {reason}; mend it, or name another with --tracking-uri") from error


def _runs(client: MlflowClient, experiment_id: str) -> list[Run]:
    """The experiment's finished runs, newest first."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            "attributes.status = 'FINISHED'",
            max_results=_PAGE,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _result(client: MlflowClient, run: Run) -> Result:
    tags, params, run_id = run.data.tags, run.data.params, run.info.run_id
    tasks, rows = _matrix(client, run_id)
    metrics = {name: float(value) for name, value in run.data.metrics.items()}
    rises = [_rise(client, run_id, name) for name in metrics if name.startswith("perplexity/")]
    if rises:
        metrics["perplexity_rise"] = sum(rises) / len(rises)
    shown = ("method.", "training.", "evaluation.", "model.", "seed", "stream", "tasks")
    return Result(
        method=tags["neft.method"],
        order=tags["neft.order"],
        seed=int(tags["neft.seed"]),
        rate=float(tags["neft.learning_rate"]),
        tuning=tags["neft.tuning"] == "true",
        tasks=tasks,
        rows=rows,
        majority={task: float(params[f"majority.{task}"]) for task in tasks if f"majority.{task}" in params},
        metrics=metrics,
        params={name: value for name, value in sorted(params.items()) if name.startswith(shown)},
        versions={
            name.removeprefix("neft.version."): number
            for name, number in sorted(tags.items())
            if name.startswith("neft.version.")
        },
        started=int(run.info.start_time),
        run_id=run_id,
        config_digest=tags["neft.config_digest"],
    )


def _matrix(client: MlflowClient, run_id: str) -> tuple[tuple[str, ...], tuple[tuple[float | None, ...], ...]]:
    """Tasks and rows of the R matrix, which is kept as a table."""
    with tempfile.TemporaryDirectory() as folder:
        table = json.loads(Path(client.download_artifacts(run_id, "r_matrix.json", folder)).read_text())
    rows = tuple(tuple(_number(cell) for cell in line[1:]) for line in table["data"])
    return tuple(table["columns"][1:]), rows


def _number(cell: object) -> float | None:
    return None if not isinstance(cell, int | float) or math.isnan(cell) else float(cell)


def _rise(client: MlflowClient, run_id: str, probe: str) -> float:
    history = sorted(client.get_metric_history(run_id, probe), key=lambda point: point.step)
    return float(history[-1].value / history[0].value - 1)


def chosen(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Method -> its results at the learning rate that learnt best on the first order and seed, as `neft compare` does.

    Methods stand in the order in which they were begun.
    """
    picked = {}
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        rates = learning_accuracies(own)
        rate = max(sorted(rates), key=lambda each: rates[each]) if rates else own[0].rate
        picked[method] = [result for result in own if result.rate == rate]
    return picked


def learning_accuracies(results: Sequence[Result]) -> dict[float, float]:
    """Learning rate -> mean learning accuracy (average accuracy of a method without) on the first order and seed."""
    scores: dict[float, list[float]] = {}
    for result in results:
        if result.tuning:
            average = result.metrics.get("continual/average_accuracy", 0.0)
            scores.setdefault(result.rate, []).append(result.metrics.get("continual/learning_accuracy", average))
    return {rate: sum(values) / len(values) for rate, values in scores.items()}
