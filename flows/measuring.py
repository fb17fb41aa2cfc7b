"""Measuring: what each state of the model scores, measured once and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from flows.identity import digest, evaluation_of
from flows.modes import Modes, prove
from flows.progress import say
from flows.setting import Setting
from flows.standing import Standing
from flows.tracking import Tracker
from neft.evaluation import Probe, evaluate, perplexity
from neft.forgetting import AccuracyMatrix, general_delta
from neft.harness import HarnessProbe
from neft.routing import Signature
from neft.states import States
from neft.tasks import Task
from registry import Entry, Evaluation, Registry

#: A value, how many examples it was computed from, and what else is worth keeping.
_Measurement = tuple[float, int, dict[str, Any]]


class Measuring:
    """The R matrix, in every mode, and the general probes of each state, which grow as the stream goes on."""

    def __init__(self, setting: Setting, standing: Standing, registry: Registry, tracker: Tracker):
        self._setting, self._standing = setting, standing
        self._registry, self._tracker = registry, tracker
        tasks = setting.tasks
        self.matrix = AccuracyMatrix(tuple(task.name for task in tasks), (), tuple(len(task.eval) for task in tasks))
        self.modes = Modes(("consolidated",), self.matrix)
        #: For each row of the R matrix and each task, the values of the task's examples; for the modes alone.
        self._values: list[list[list[float]]] = []
        self._run_id: int
        #: The general probes of each row.
        self._general: list[dict[str, float]] = []

    def choose_modes(self, signatures: Sequence[Signature]) -> None:
        """Score in the configured modes; the model is still untouched, as it is when a router reads a request."""
        modes = self._setting.config.evaluation.modes
        self.modes = Modes(modes, self.matrix)
        if "routed" in modes:
            self.modes.read(self._standing.model, self._standing.tokenizer, self._setting.tasks, signatures)

    def measure(self, run_id: int) -> None:
        """Measure the model as it stands on tasks, as the course has it, and on every probe: the R matrix grows.

        Args:
            run_id: the registry's id of the run, within which no state is measured twice.
        """
        self._run_id = run_id
        found: dict[int, Evaluation] = {}

        def score(place: int) -> float:
            found[place] = self._score(self._setting.tasks[place])
            return found[place].value

        self.matrix = self._setting.course.measured(self.matrix, score)
        self._general.append(self._probes())
        if self.modes.matrices:
            self._values.append([found[place].details["values"] for place in range(len(self._setting.tasks))])
            self.modes.add(self._values[-1])
        self._show()

    def _show(self) -> None:
        """Show the newest row in MLflow, and say it."""
        tasks, learnt = self._setting.tasks, self.matrix.learnt
        row = zip(tasks, self.matrix.rows[-1], strict=True)
        scored = [(task, score) for task, score in row if score is not None]
        shown = {f"{task.metric}/{task.name}": score for task, score in scored}
        shown |= {f"continual/{name}": value for name, value in self._continual().items()}
        shown |= self._general[-1] | self.modes.metrics()
        self._tracker.log_row(shown, learnt)
        said = ", ".join(f"{task.name} {score:.3f}" for task, score in scored)
        say(f"{'untouched model' if learnt == 0 else f'after {learnt} of {len(tasks)}'}: {said}")

    def _score(self, task: Task) -> Evaluation:
        def measure() -> _Measurement:
            score = evaluate(self._standing.model, self._standing.tokenizer, task, self._setting.config.evaluation_spec)
            return score.value, score.examples, {"values": list(score.values)}

        return self._measured(task.name, task.metric, task.eval_fingerprint, measure)

    def _probes(self) -> dict[str, float]:
        """What the model scores on every general probe."""
        measured = self._measured
        found = {
            f"perplexity/{each.name}": measured(each.name, "perplexity", each.fingerprint, self._perplexity(each))
            for each in self._setting.probes
        }
        found |= {
            f"harness/{each.name}": measured(each.name, "harness", each.fingerprint, self._harness(each))
            for each in self._setting.harness
        }
        return {name: evaluation.value for name, evaluation in found.items()}

    def _perplexity(self, probe: Probe) -> Callable[[], _Measurement]:
        return lambda: (perplexity(self._standing.model, self._standing.tokenizer, probe), probe.tokens, {})

    def _harness(self, probe: HarnessProbe) -> Callable[[], _Measurement]:
        return lambda: (*probe.accuracy(self._standing.model, self._standing.tokenizer), {})

    def _measured(self, name: str, metric: str, fingerprint: str, measure: Callable[[], _Measurement]) -> Evaluation:
        """A score of this very state on this very data: measured, unless this run did so before it was interrupted."""
        config = self._setting.config
        identity = digest([self._run_id, fingerprint, metric, evaluation_of(config), config.training.max_length])
        known = self._registry.evaluation(self._standing.state, identity)
        if known is not None:
            return known
        start = time.perf_counter()
        value, examples, details = measure()
        return self._registry.record_evaluation(
            state_digest=self._standing.state,
            data_digest=identity,
            task=name,
            metric=metric,
            value=value,
            examples=examples,
            details={"seconds": time.perf_counter() - start, **details},
        )

    def _continual(self) -> dict[str, float]:
        """The continual-learning metrics so far, by the names in `neft.forgetting.FORMULAS`."""
        found = self.matrix.metrics()
        if self._general[-1] and len(self._general) > 1 and self._setting.course.accumulates:
            found["general_delta"] = general_delta(self._general[0], self._general[-1])
        return found

    def of_entry(self) -> dict[str, Any]:
        """What the newest state scores, as the metrics of its entry have it."""
        return {"scores": self.scores, "continual": self._continual(), "general": self._general[-1]}

    def of_run(self) -> dict[str, Any]:
        """What was measured so far, as the run's record has it."""
        matrices = {mode: matrix.to_dict() for mode, matrix in self.modes.matrices.items()}
        return {
            "matrix": self.matrix.to_dict() | {"modes": matrices},
            "metrics": self._continual() | self.modes.metrics(),
        }

    @property
    def scores(self) -> dict[str, float | None]:
        """Task -> what the newest state scores on it."""
        return dict(zip(self.matrix.tasks, self.matrix.rows[-1], strict=True))

    def prove(self) -> None:
        """Check out every state that the oracle goes back to, and measure it again."""
        standing, tasks = self._standing, self._setting.tasks
        standing.load_base()
        states = States(standing.model, {entry.reference: self._registry.overlay(entry) for entry in standing.chain})
        # A task that was skipped has a row of the R matrix, but no entry.
        places = {task.name: place for place, task in enumerate(tasks)}
        expected = [(entry, self._values[places[entry.task] + 1][places[entry.task]]) for entry in standing.chain]

        def measure(entry: Entry) -> Sequence[float]:
            task = tasks[places[entry.task]]
            return evaluate(standing.model, standing.tokenizer, task, self._setting.config.evaluation_spec).values

        prove(states, expected, measure)
        say(f"checked out all {len(standing.chain)} states again: same weights, same scores")
