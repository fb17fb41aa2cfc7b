"""Pictures of a stream's results, and of a model without its keystones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter

from flows.inspection import Ablated
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
