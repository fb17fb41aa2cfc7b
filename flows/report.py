"""The report: a stream's R matrix and metrics, as a table to read or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.failures import skipped_in
from flows.modes import ROUTING, formula_of
from neft.forgetting import FORMULAS, AccuracyMatrix
from registry import Run


def matrix_of(run: Run) -> AccuracyMatrix:
    """The R matrix as far as the run has measured it."""
    if run.matrix is None:
        return AccuracyMatrix(tuple(run.tasks), (), (0,) * len(run.tasks))
    return AccuracyMatrix.from_dict(run.matrix)


def modes_of(run: Run) -> dict[str, AccuracyMatrix]:
    """The R matrices of the modes beside `consolidated`, by their names."""
    kept = (run.matrix or {}).get("modes", {})
    return {mode: AccuracyMatrix.from_dict(matrix) for mode, matrix in kept.items()}


def as_json(run: Run) -> dict[str, Any]:
    """The run's matrix and metrics, with the formula beside every metric."""
    return {
        "stream": run.stream,
        "run": run.id,
        "status": run.status,
        "error": run.error,
        "method": run.config["method"],
        "seed": run.config["seed"],
        "tasks": list(run.tasks),
        "skipped": {each.task: each.error for each in skipped_in(run)},
        "matrix": [list(row) for row in matrix_of(run).rows],
        "modes": {mode: [list(row) for row in matrix.rows] for mode, matrix in modes_of(run).items()},
        "metrics": dict(run.metrics or {}),
        "formulas": {name: formula_of(name) for name in run.metrics or {}},
        "mlflow_run_id": run.mlflow_run_id,
        "tracking": run.tracking,
        "started_at": run.started_at.isoformat(),
        "finished_at": run.finished_at.isoformat() if run.finished_at else None,
    }


def as_table(runs: Sequence[Run]) -> RenderableType:
    """Each run's matrix, then the metrics of all runs side by side."""
    parts: list[RenderableType] = []
    for run in runs:
        parts += [_matrix_table(run), Text("")]
    return Group(*parts, _metrics_table(runs))


def _matrix_table(run: Run) -> Table:
    matrix = matrix_of(run)
    method = run.config["method"]
    by = method["baseline"] or f"{method['scorer']}, {method['protection']}"
    state = "" if run.status == "finished" else f" - {run.status} after {matrix.learnt} of {len(matrix.tasks)} tasks"
    table = Table(title=f"{run.stream} (run {run.id}, {by}){state}: score on each task after each task")
    table.add_column("after")
    for name in matrix.tasks:
        table.add_column(name, justify="right")
    skipped = {each.task for each in skipped_in(run)}
    names = [f"{name} (skipped)" if name in skipped else name for name in matrix.tasks]
    for learnt, row in enumerate(matrix.rows):
        cells = [
            Text("-" if score is None else f"{score:.3f}", style="bold" if learnt == place + 1 else "")
            for place, score in enumerate(row)
        ]
        table.add_row("(untouched)" if learnt == 0 else names[learnt - 1], *cells)
    return table


def _metrics_table(runs: Sequence[Run]) -> Table:
    table = Table(title="continual learning")
    table.add_column("metric")
    columns: list[tuple[Run, str]] = []
    for run in runs:
        modes = list(modes_of(run))
        table.add_column(f"{run.stream}, consolidated" if modes else run.stream, justify="right")
        for mode in modes:
            table.add_column(f"{run.stream}, {mode}", justify="right")
        columns += [(run, ""), *((run, f"{mode}/") for mode in modes)]
    table.add_column("formula", overflow="fold")
    for name, formula in FORMULAS.items():
        _add_metric(table, name, formula, [(run.metrics or {}).get(f"{mode}{name}") for run, mode in columns])
    for name, formula in ROUTING.items():
        values = [(run.metrics or {}).get(name) if name.startswith(mode) and mode else None for run, mode in columns]
        _add_metric(table, name, formula, values)
    return table


def _add_metric(table: Table, name: str, formula: str, values: Sequence[float | None]) -> None:
    if any(value is not None for value in values):
        table.add_row(name, *("-" if value is None else f"{value:+,.3f}" for value in values), Text(formula))
