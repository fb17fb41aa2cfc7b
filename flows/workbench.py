"""The workbench: what a stream run holds in memory while its flow goes on, and the work of each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from flows.by_baseline import ByBaseline
from flows.by_neurons import ByNeurons
from flows.config import StreamConfig
from flows.costs import Costs
from flows.failures import Skipped, skipped_in, with_skipped
from flows.figures import heatmap
from flows.identity import run_digest, task_digest
from flows.learning import Learner, Work
from flows.measuring import Measuring
from flows.opening import Opening
from flows.progress import say
from flows.setting import Setting, load
from flows.standing import Standing
from flows.tracking import Tracker
from neft.errors import FailedError, NeftError, RecordError
from neft.forgetting import AccuracyMatrix
from registry import Entry, Registry, Run


class Workbench:
    """The model as it stands, the way it learns, what it scores, and where the run is recorded and shown.

    Prefect's tasks call its methods by name, so that no model ever passes through Prefect.
    """

    def __init__(self, config: StreamConfig, registry: Registry, tracker: Tracker, flow_run_id: str | None):
        self.config, self.registry, self.tracker = config, registry, tracker
        self.flow_run_id = flow_run_id
        self.setting: Setting
        self.standing: Standing
        self.learner: Learner
        self.measuring: Measuring
        self.run: Run
        self.skipped: list[Skipped] = []
        self._sources: Sequence[Entry] = ()
        self._work: Work | None = None
        self._costs = Costs()

    # Before the first task

    def load(self) -> None:
        """Load data and model, and find the neurons."""
        start = time.perf_counter()
        setting, standing = self.setting, self.standing = load(self.config)
        registry, tracker = self.registry, self.tracker
        if setting.baseline is None:
            self.learner = ByNeurons(setting, standing, registry, tracker)
        else:
            self.learner = ByBaseline(setting.baseline, setting, standing, tracker)
        self.measuring = Measuring(setting, standing, registry, tracker)
        tasks, space = setting.tasks, setting.space
        say(
            f"loaded {self.config.model.name} ({space.model_parameters:,} parameters, {len(space):,} neurons "
            f"in {len(space.sites)} sites) and {len(tasks)} tasks in {time.perf_counter() - start:.1f} s"
        )
        majorities = [f"{task.name} {task.majority:.3f}" for task in tasks if task.majority is not None]
        if majorities:
            say(f"always answering the commonest label scores: {', '.join(majorities)}")

    def open_run(self) -> bool:
        """Begin this run, or go on with it where it stopped; False when it is finished already."""
        identity = run_digest(self.setting, self.standing.tokenizer)
        opening = Opening(self.setting, identity, self.registry, self.tracker, self.flow_run_id)
        finished = opening.finished()
        if finished is not None:
            self.run, self.skipped = finished, list(skipped_in(finished))
            return False
        opened = opening.open(self.standing.model)
        self.run, self._sources = opened.run, opened.sources
        return True

    def reserve(self) -> None:
        """Let what is to be learnt by look at the untouched model."""
        self.learner.reserve()

    def sign(self) -> None:
        """Make every task's signature, while the model is still untouched, as it is when a router reads a request."""
        start = time.perf_counter()
        signatures = self.learner.sign()
        if signatures:
            self.measuring.choose_modes(signatures)
            say(f"made the signatures of {len(signatures)} tasks in {time.perf_counter() - start:.1f} s")

    # One task

    @property
    def work(self) -> Work:
        """The task on the bench."""
        assert self._work is not None
        return self._work

    def begin(self, position: int) -> None:
        """Put a task on the bench, in place of the one before."""
        setting, standing = self.setting, self.standing
        task = setting.lessons[position]
        setting.course.begin(standing.model)
        if not setting.course.accumulates:
            # The task goes on from another state than the one before has left.
            standing.settle()
        identity = task_digest(setting, standing.tokenizer, task, standing.state, self._sources)
        self._work = Work(position, len(setting.lessons), task, identity, self._sources)
        self.learner.begin(self._work)

    def recall(self) -> bool:
        """Take the task from its entry, when this very work was done before; True if so."""
        entry = self.learner.recall(self.work)
        if entry is None:
            return False
        self._costs.training_seconds += entry.metrics.get("training_seconds", 0.0)
        self.tracker.close_recorded(entry.mlflow_run_id)
        self.work.say(f"recorded as {entry.reference}, not learnt again")
        return True

    def recall_skipped(self) -> bool:
        """Leave the task out, when a run of this stream has tried this very work before and left it out; True if so."""
        known = [each for run in self.registry.runs(self.config.stream) for each in skipped_in(run)]
        found = [each for each in known if each.input_digest == self.work.input_digest]
        if self.config.on_failure != "skip" or not found:
            return False
        self._leave_out(found[-1])
        self.work.say(f"skipped before, and not tried again before its config changes: {found[-1].error}")
        return True

    def open_task(self) -> None:
        """Begin the task's MLflow run."""
        work = self.work
        params = {"task": work.task.name, "position": work.position + 1, "metric": work.task.metric}
        params |= {"train_examples": len(work.task.train), "eval_examples": len(work.task.eval)}
        work.run_id = self.tracker.start_task(
            work.task, params, {"neft.stream": self.config.stream, "neft.seed": str(self.config.seed)}
        )

    def score(self) -> None:
        """Score the neurons for the task."""
        self.learner.score(self.work)

    def select(self) -> None:
        """Choose the task's neurons."""
        self.learner.select(self.work)

    def train(self) -> None:
        """Train the task, and say what its audit found."""
        work = self.work
        outcome = work.outcome = self.learner.train(work)
        self._costs.training_seconds += outcome.result.seconds
        outside = outcome.audit.parameters_outside
        audited = f", {outside:,} other parameters bit-identical" if outside else ""
        work.say(
            f"trained {outcome.result.steps} steps in {outcome.result.seconds:.1f} s, "
            f"mean loss {outcome.result.loss:.3f}{audited}"
        )

    def roll_back(self) -> None:
        """Bring the model back, bit for bit, to what it was before the task."""
        self.learner.roll_back(self.work)

    def may_skip(self, error: NeftError) -> bool:
        """Whether the stream goes on after a task failed: if it is to, and the records are not what failed."""
        return self.config.on_failure == "skip" and not isinstance(error, RecordError)

    def skip(self, error: NeftError) -> None:
        """Leave the task out, and say so in every record."""
        work, reason = self.work, _reason(error)
        self.tracker.tag(work.run_id, {"neft.error": reason})
        self.tracker.finish(work.run_id, finished=False)
        self._leave_out(Skipped(work.task.name, work.input_digest, reason, work.run_id))
        work.say(f"skipped: {reason}")
        self._work = None

    def _leave_out(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self.run = self.registry.update_run(self.run.id, tracking=with_skipped(self.run.tracking, self.skipped))

    def evaluate(self) -> None:
        """Measure the model as it stands on every task and probe; the R matrix grows, and the run's record with it."""
        self.measuring.measure(self.run.id)
        self.run = self.registry.update_run(self.run.id, **self.measuring.of_run())

    def record(self) -> None:
        """Record the entry, if the task has one. The task's MLflow run ends."""
        work, outcome = self.work, self.work.outcome
        assert outcome is not None
        entry = self.learner.record(work, self.measuring.of_entry(), self.flow_run_id)
        if entry is not None:
            self.tracker.tag(work.run_id, {"neft.entry": entry.reference})
            work.say(f"recorded as {entry.reference}")
        self.tracker.tag(work.run_id, {"neft.audit.identical": str(outcome.audit.identical).lower()})
        if (score := self.measuring.scores.get(work.task.name)) is not None:
            self.tracker.log(work.run_id, {f"eval/{work.task.metric}": score}, outcome.result.steps)
        self.tracker.finish(work.run_id)
        self._work = None

    # At the end

    def prove(self) -> None:
        """Check out every state that the oracle goes back to, and measure it again."""
        self.measuring.prove()

    def finish(self) -> None:
        """End the run: each mode's matrix as a table, and that of the newest states as a picture."""
        matrix, tracker, chain = self.measuring.matrix, self.tracker, self.standing.chain
        self._log_matrix(matrix, "r_matrix.json")
        for mode, of_mode in self.measuring.modes.matrices.items():
            self._log_matrix(of_mode, f"r_matrix_{mode}.json")
        tracker.log_figure(heatmap(matrix, f"R matrix of {self.config.stream}"), "r_matrix.png")
        tasks, entries = len(self.setting.tasks), [entry.reference for entry in chain]
        tracker.log(tracker.run_id, self._costs.metrics(chain, self.setting.baseline, tasks), tasks)
        tracker.tag(tracker.run_id, {"neft.entries": ", ".join(entries)})
        # The registry comes last: a run that it calls finished is never opened again.
        tracker.finish(tracker.run_id)
        tracking = with_skipped(self.run.tracking, self.skipped) | {"entries": entries}
        self.run = self.registry.update_run(self.run.id, status="finished", tracking=tracking)

    def _log_matrix(self, matrix: AccuracyMatrix, name: str) -> None:
        skipped = {each.task for each in self.skipped}
        rows = ["untouched", *(f"after {task}{' (skipped)' * (task in skipped)}" for task in matrix.tasks)]
        table: dict[str, list[Any]] = {"state": rows}
        for place, task in enumerate(matrix.tasks):
            table[task] = [row[place] for row in matrix.rows]
        self.tracker.log_table(self.tracker.run_id, table, name)

    def fail(self, error: BaseException) -> None:
        """Leave every record of the run in a truthful state; it goes on from there when it is started again."""
        reason = _reason(error)
        open_runs = [self.tracker.run_id] if self._work is None else [self._work.run_id, self.tracker.run_id]
        try:
            self.registry.update_run(self.run.id, status="failed", error=reason)
            for run_id in filter(None, open_runs):
                self.tracker.tag(run_id, {"neft.error": reason})
                self.tracker.finish(run_id, finished=False)
        except FailedError as second:
            # The first failure is the one to report; this one only leaves a record open.
            say(str(second))


def _reason(error: BaseException) -> str:
    """What went wrong, as records keep it."""
    return (str(error).strip() or type(error).__name__)[:2000]


_BENCH: ContextVar[Workbench] = ContextVar("neft_workbench")


@contextmanager
def on(bench: Workbench) -> Iterator[None]:
    """Make `bench` the one that the flow's steps work on."""
    token = _BENCH.set(bench)
    try:
        yield
    finally:
        _BENCH.reset(token)


def current() -> Workbench:
    """The workbench of the flow that is running."""
    return _BENCH.get()
