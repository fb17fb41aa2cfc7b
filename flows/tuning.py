"""Which cells of a comparison are learnt already, here or elsewhere, and which learning rate learnt best."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from flows.comparison import Cell, Comparison
from flows.config import StreamConfig
from flows.registries import Where
from registry import Run

if TYPE_CHECKING:
    from flows.known import Known


class Ledger:
    """What the registry says of a comparison's cells, and what is known of those that were learnt elsewhere."""

    def __init__(self, comparison: Comparison, known: Known | None = None):
        self._known = known
        self._registry = Where.of(comparison.config.registry).open()

    def close(self) -> None:
        self._registry.close()

    def _run(self, config: StreamConfig) -> Run | None:
        """The stream's newest run, when it is finished, is of this config, and no file of it has changed since.

        Whether a stream is learnt is decided by content, which takes its model. This is the cheap answer, which never
        says yes in vain: a stream for which it says no is opened, and found to be learnt then.
        """
        if config.stream not in self._registry.streams():
            return None
        run = self._registry.newest_run(config.stream)
        same = _computed(run.config) == _computed(config.model_dump(mode="json"))
        if run.status != "finished" or run.finished_at is None or not same:
            return None
        return run if _changed_at(run.config) <= run.finished_at.timestamp() else None

    def learnt(self, cell: Cell) -> bool:
        """Whether nothing of the cell is left to learn."""
        return all(self._metrics(config) is not None for config in cell.streams)

    def _metrics(self, config: StreamConfig) -> Mapping[str, float] | None:
        """Continual-learning metrics of the finished stream; None while unlearnt."""
        run = self._run(config)
        if run is not None:
            return run.metrics or {}
        return self._known.metrics(config) if self._known is not None else None

    def accuracy(self, cell: Cell) -> float | None:
        """Mean learning accuracy of the cell's streams (average accuracy of a method without); None while unlearnt."""
        scores = []
        for config in cell.streams:
            metrics = self._metrics(config)
            if metrics is None:
                return None
            scores.append(float(metrics.get("learning_accuracy", metrics.get("average_accuracy", 0.0))))
        return statistics.mean(scores)


def _computed(config: Mapping[str, object]) -> dict[str, object]:
    """The part of a config that decides what is computed."""
    return {key: value for key, value in config.items() if key not in ("tracking", "registry")}


def _changed_at(value: object) -> float:
    """When the newest of all files that a config names was last changed, in seconds."""
    if isinstance(value, Mapping):
        return max(map(_changed_at, value.values()), default=0.0)
    if isinstance(value, list | tuple):
        return max(map(_changed_at, value), default=0.0)
    if not isinstance(value, str) or not value.startswith("/") or "\n" in value:
        return 0.0
    path = Path(value)
    files = path.iterdir() if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def choose(comparison: Comparison, ledger: Ledger, failed: Collection[str] = ()) -> dict[str, float]:
    """Method -> the learning rate that learnt best on the first order and seed; of equal ones the smallest.

    A method is left out while one of its rates is still to be tried.

    Args:
        failed: names of cells that were tried in vain, whose rates are out.
    """
    tried: dict[str, dict[float, float | None]] = {}
    for cell in comparison.first():
        if len(comparison.rates(cell.method)) == 1:
            tried[cell.method] = {cell.rate: 0.0}
        elif cell.name not in failed:
            tried.setdefault(cell.method, {})[cell.rate] = ledger.accuracy(cell)
    return {method: best(scores) for method, scores in tried.items() if None not in scores.values()}


def best(scores: Mapping[float, float | None]) -> float:
    """The learning rate with the highest score; of equal ones the smallest."""
    return max(sorted(scores), key=lambda rate: scores[rate] or 0.0)


def states(comparison: Comparison, known: Known | None = None) -> list[tuple[str, str]]:
    """Name and state of every cell, in the order in which they are learnt."""
    with closing(Ledger(comparison, known)) as ledger:
        chosen = choose(comparison, ledger)
        cells = [*comparison.first(), *comparison.rest(chosen)]
        found = [(cell.name, "learnt" if ledger.learnt(cell) else "to learn") for cell in cells]
    return found + [(f"{comparison.name}.{name}", "waits for tuning") for name in comparison.unknown(chosen)]
