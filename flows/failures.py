"""Failures: the tasks that a stream has left out because they could not be learnt, as its runs record them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from registry import Run

_KEY = "skipped"


@dataclass(frozen=True)
class Skipped:
    """A task that was tried and left out: what went into it, what went wrong, and the MLflow run that shows it."""

    task: str
    input_digest: str
    error: str
    mlflow_run_id: str | None


def skipped_in(run: Run) -> tuple[Skipped, ...]:
    """The tasks that a run has left out, in order."""
    return tuple(Skipped(**described) for described in (run.tracking or {}).get(_KEY, ()))


def with_skipped(tracking: Mapping[str, Any] | None, skipped: Iterable[Skipped]) -> dict[str, Any]:
    """What a run records of its tracking, with the tasks that it has left out."""
    return {**(tracking or {}), _KEY: [asdict(each) for each in skipped]}
