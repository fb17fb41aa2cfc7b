"""Pictures of a stream's results."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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
