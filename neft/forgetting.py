"""The R matrix of a stream, and the metrics of the continual-learning literature computed from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neft.errors import InputError

#: Metric name -> its formula, shown beside every number. T tasks are learnt; R[t,i] is the score on task i after t.
FORMULAS = {
    "average_accuracy": "mean_i R[T,i]",
    "average_accuracy_micro": "sum_i n_i R[T,i] / sum_i n_i, n_i the evaluation examples of task i",
    "learning_accuracy": "mean_i R[i,i]",
    "backward_transfer": "1/(T-1) sum_{i<T} (R[T,i] - R[i,i]) (Lopez-Paz & Ranzato 2017)",
    "forgetting": "1/(T-1) sum_{i<T} (max_{i<=l<T} R[l,i] - R[T,i]) (Chaudhry et al. 2018)",
    "forward_transfer": "1/(T-1) sum_{i>1} (R[i-1,i] - R[0,i])",
    "intransigence": "mean_i (R*[i] - R[i,i]), R* from joint training",
    "general_delta": "mean over general probes of (G[T] - G[0]), G minus the natural log of a text's perplexity "
    "(log-likelihood per token), or a harness task's accuracy",
}


@dataclass(frozen=True)
class AccuracyMatrix:
    """R[t,i], the score on task i after t tasks were learnt; row 0 is the untouched model.

    `rows` has up to len(tasks) + 1 rows; None marks a score that was not measured. `examples` are the sizes of the
    tasks' evaluation data, for the micro average.
    """

    tasks: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]
    examples: tuple[int, ...]

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: rows of another length than the tasks, or more rows than tasks and the untouched model.
        """
        for row in self.rows:
            if len(row) != len(self.tasks):
                raise InputError(f"a row of the R matrix has {len(row)} scores for {len(self.tasks)} tasks")
        if len(self.rows) > len(self.tasks) + 1 or len(self.examples) != len(self.tasks):
            raise InputError(
                f"an R matrix of {len(self.tasks)} tasks has at most {len(self.tasks) + 1} rows and an example count "
                f"for each task, not {len(self.rows)} rows and {len(self.examples)} counts"
            )

    @property
    def learnt(self) -> int:
        """T: how many tasks were learnt so far."""
        return max(0, len(self.rows) - 1)

    def with_row(self, row: Sequence[float | None]) -> AccuracyMatrix:
        """The matrix with one more task learnt."""
        return AccuracyMatrix(self.tasks, (*self.rows, tuple(row)), self.examples)

    def array(self) -> NDArray[np.float64]:
        """(rows, tasks), NaN where nothing was measured."""
        return np.array(
            [[math.nan if score is None else score for score in row] for row in self.rows], dtype=np.float64
        )

    def metrics(self, learnt: int | None = None) -> dict[str, float]:
        """Every metric that is defined after `learnt` tasks (default: all so far), by the names in `FORMULAS`.

        Transfer and forgetting need two tasks; a metric that would need an unmeasured score is left out.
        """
        count = self.learnt if learnt is None else learnt
        if not 0 <= count <= self.learnt:
            raise InputError(f"the R matrix holds {self.learnt} learnt tasks, not {count}")
        if count == 0:
            return {}
        matrix = self.array()[: count + 1, :count]
        diagonal = matrix[np.arange(1, count + 1), np.arange(count)]
        found = {
            "average_accuracy": matrix[count].mean(),
            "average_accuracy_micro": np.average(matrix[count], weights=self.examples[:count]),
            "learning_accuracy": diagonal.mean(),
        }
        if count > 1:
            best = np.array([matrix[place + 1 : count, place].max() for place in range(count - 1)])
            before = matrix[np.arange(1, count), np.arange(1, count)]
            found["backward_transfer"] = (matrix[count, :-1] - diagonal[:-1]).mean()
            found["forgetting"] = (best - matrix[count, :-1]).mean()
            found["forward_transfer"] = (before - matrix[0, 1:]).mean()
        return {name: float(value) for name, value in found.items() if not math.isnan(value)}

    def intransigence(self, joint: Sequence[float]) -> float:
        """How far learning stays behind joint training: `joint[i]` is R*[i].

        Raises:
            InputError: not one joint score per learnt task.
        """
        if len(joint) != self.learnt or not joint:
            raise InputError(
                f"intransigence needs a joint score for each of {self.learnt} learnt tasks, not {len(joint)}"
            )
        matrix = self.array()
        return float(np.mean([score - matrix[place + 1, place] for place, score in enumerate(joint)]))

    def to_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks), "rows": [list(row) for row in self.rows], "examples": list(self.examples)}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> AccuracyMatrix:
        return cls(
            tuple(description["tasks"]),
            tuple(tuple(row) for row in description["rows"]),
            tuple(description["examples"]),
        )


def general_delta(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean change of G over the general probes; below zero means that general ability was lost.

    G is higher for the better: of `perplexity/NAME` minus its natural logarithm, which is the log-likelihood per token,
    so -0.02 means 2 % more perplexity; of `harness/NAME`, an accuracy, itself.

    Args:
        before, after: `perplexity/NAME` or `harness/NAME` -> what was measured.

    Raises:
        InputError: not the same probes.
    """
    if before.keys() != after.keys() or not before:
        raise InputError(f"general probes differ: {sorted(before)} before, {sorted(after)} after")
    return float(np.mean([_ability(name, after[name]) - _ability(name, before[name]) for name in before]))


def _ability(probe: str, value: float) -> float:
    return -math.log(value) if probe.startswith("perplexity/") else value
