"""Pictures of a stream's results, of a comparison's, and of a model without its keystones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter

from flows.inspection import Ablated
from flows.results import Result
from neft.forgetting import AccuracyMatrix


def heatmap(matrix: AccuracyMatrix, title: str) -> Figure:
    """The R matrix: tasks across, tasks learnt down, the score in each cell; a frame marks the task just learnt."""
    scores = matrix.array()
    figure = Figure(figsize=(1.6 + 1.1 * scores.shape[1], 1.4 + 0.6 * scores.shape[0]), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    rows = ["untouched", *(f"after {name}" for name in matrix.tasks[: matrix.learnt])]
    axes.set_xticks(range(len(matrix.tasks)), matrix.tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), score in _cells(matrix):
        axes.text(column, row, f"{score:.2f}", ha="center", va="center", color="black" if score > 0.6 else "white")
        if row == column + 1:
            axes.add_patch(_frame(column, row))
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="score")
    return figure


def _cells(matrix: AccuracyMatrix) -> list[tuple[tuple[int, int], float]]:
    scores = matrix.array()
    return [
        ((row, column), float(scores[row, column]))
        for row in range(scores.shape[0])
        for column in range(scores.shape[1])
        if not math.isnan(scores[row, column])
    ]


def _frame(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="white", linewidth=2)


def ablation(rows: Sequence[Ablated], title: str) -> Figure:
    """Perplexity and task scores against how many neurons are silenced; dashed, against as many random ones."""
    probes, tasks = list(rows[0].perplexity), list(rows[0].scores)
    figure = Figure(figsize=(11 if probes else 6, 4.5), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, 2 if probes else 1, squeeze=False)[0])
    if probes:
        _curves(panels[0], rows, probes, lambda row, name: row.perplexity[name])
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter(ScalarFormatter())
        panels[0].yaxis.set_minor_formatter(ScalarFormatter())
        panels[0].set_ylabel("perplexity of general text")
    _curves(panels[-1], rows, tasks, lambda row, name: row.scores[name])
    panels[-1].set_ylim(-0.02, 1.02)
    panels[-1].set_ylabel("score")
    figure.suptitle(title)
    return figure


def _curves(axes: Axes, rows: Sequence[Ablated], names: Sequence[str], value: Callable[[Ablated, str], float]) -> None:
    """A solid line a name for keystones, a dashed one for random neurons; counts stand evenly, as they are few."""
    counts = sorted({row.count for row in rows})
    for number, name in enumerate(names):
        for which, style in (("keystone", "-o"), ("random", "--x")):
            points = [(counts.index(row.count), value(row, name)) for row in rows if row.which in (which, "none")]
            axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=f"{name}, {which}")
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("neurons silenced")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def comparison(results: Mapping[str, Sequence[Result]], everything: Sequence[Result]) -> dict[str, Figure]:
    """A comparison's pictures by file name: an R matrix a method, the average over tasks learnt, and the frontier.

    Args:
        results: method -> its runs at the learning rate that learnt best.
        everything: the runs at every learning rate.
    """
    pictures = {}
    for method, runs in results.items():
        if (matrix := mean_matrix(runs)) is not None:
            pictures[f"r-matrix-{method}"] = heatmap(matrix, f"R matrix of {method}, mean of {_same_order(runs)} seeds")
    pictures["average-accuracy"] = average_curves(results)
    pictures["frontier"] = frontier(everything)
    return pictures


def _same_order(runs: Sequence[Result]) -> int:
    return sum(run.order == runs[0].order for run in runs)


def mean_matrix(runs: Sequence[Result]) -> AccuracyMatrix | None:
    """The mean R matrix over the seeds of the first run's order; None of tasks that were learnt alone."""
    tasks = runs[0].tasks
    if len(tasks) < 2:
        return None
    arrays = [
        np.array([[math.nan if score is None else score for score in row] for row in run.rows])
        for run in runs
        if run.order == runs[0].order
    ]
    mean = np.mean(arrays, axis=0)
    rows = tuple(tuple(None if math.isnan(score) else float(score) for score in row) for row in mean)
    return AccuracyMatrix(tasks, rows, (1,) * len(tasks))


def average_curves(results: Mapping[str, Sequence[Result]]) -> Figure:
    """Average accuracy over the tasks learnt so far, a curve a method; the band is one standard deviation."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (method, runs) in enumerate(results.items()):
        curves = np.array([_averages(run) for run in runs if len(run.tasks) == len(runs[0].tasks)])
        steps, mean, colour = range(1, curves.shape[1] + 1), curves.mean(axis=0), f"C{number % 10}"
        axes.plot(steps, mean, "-o" if number < 10 else "--s", color=colour, label=method, markersize=4)
        if len(curves) > 1:
            width = curves.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - width, mean + width, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks(range(1, max((len(runs[0].tasks) for runs in results.values()), default=1) + 1))
    axes.set_xlabel("tasks learnt")
    axes.set_ylabel("mean score on them")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _averages(run: Result) -> list[float]:
    """Mean score on the first t tasks after t, for every t; NaN where one was not measured."""
    scores = [[math.nan if score is None else score for score in row] for row in run.rows]
    return [float(np.mean(row[:learnt])) for learnt, row in enumerate(scores) if learnt]


def frontier(results: Sequence[Result]) -> Figure:
    """Plasticity against stability: learning accuracy and backward transfer, a point a method and learning rate."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    across, down = "continual/learning_accuracy", "continual/backward_transfer"
    for number, method in enumerate(dict.fromkeys(result.method for result in results)):
        points: dict[float, list[tuple[float, float]]] = {}
        for result in results:
            if result.method == method and across in result.metrics and down in result.metrics:
                points.setdefault(result.rate, []).append((result.metrics[across], result.metrics[down]))
        means = [(rate, *np.mean(found, axis=0)) for rate, found in sorted(points.items())]
        if not means:
            continue
        style = "-o" if number < 10 else "--s"
        axes.plot([x for _, x, _ in means], [y for _, _, y in means], style, color=f"C{number % 10}", label=method)
        for rate, x, y in means:
            axes.annotate(f"{rate:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize="x-small")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("learning accuracy")
    axes.set_ylabel("backward transfer")
    if axes.lines[1:]:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
