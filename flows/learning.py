"""Learning: what a way to learn a stream's tasks is, whether by neurons or by a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from flows.progress import say
from flows.setting import Setting
from flows.tracking import Tracker
from neft.audit import AuditResult
from neft.errors import FailedError
from neft.guard import Guard
from neft.routing import Signature
from neft.tasks import Task
from neft.training import TrainingResult, train
from registry import Entry


@dataclass(frozen=True)
class Outcome:
    """What training a task came to, and the audit of what it left alone."""

    result: TrainingResult
    audit: AuditResult


@dataclass
class Work:
    """One task on the bench.

    Attributes:
        position: its place among the `count` lessons, from 0.
        input_digest: identity of what goes into learning it.
        sources: entries of other streams that it may start from.
        run_id: its MLflow run, once it has begun.
        outcome: what training it came to, once it has.
    """

    position: int
    count: int
    task: Task
    input_digest: str
    sources: Sequence[Entry]
    run_id: str = ""
    outcome: Outcome | None = None

    def say(self, line: str) -> None:
        """Say a line of this task."""
        say(f"[{self.position + 1}/{self.count}] {self.task.name}: {line}")


class Learner(Protocol):
    """A way to learn a stream's tasks, one after another, on the model as it stands.

    It must say how a task is trained and how the model is brought back; the rest does nothing unless it is overridden.
    """

    #: Whether neurons are scored and selected before a task is trained.
    selects: ClassVar[bool] = False

    def reserve(self) -> None:
        """Look at the untouched model, once a run, before anything is learnt."""
        return

    def sign(self) -> Sequence[Signature]:
        """Every task's signature, of the untouched model; none where the states it leaves cannot be gone back to."""
        return ()

    def begin(self, work: Work) -> None:
        """Make ready for a task; the model is as the task before left it."""
        return

    def recall(self, work: Work) -> Entry | None:
        """Bring the model to what it was after this very work, if that is recorded; its entry."""
        return None

    def score(self, work: Work) -> None:
        """Score the neurons for the task."""
        return

    def select(self, work: Work) -> None:
        """Choose the task's neurons."""
        return

    def train(self, work: Work) -> Outcome:
        """Train the task; the model then holds it.

        Raises:
            FailedError: training failed, or changed what it was to leave alone.
        """
        ...

    def roll_back(self, work: Work) -> None:
        """Bring the model back, bit for bit, to what it was before the task.

        Raises:
            RecordError: what is kept does not give that state back.
        """
        ...

    def record(self, work: Work, measured: dict[str, Any], flow_run_id: str | None) -> Entry | None:
        """Record the task's entry, if it has one.

        Args:
            measured: what the state scores, as the entry's metrics have it.
        """
        return None


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    work: Work,
    setting: Setting,
    tracker: Tracker,
    guard: Guard | None,
) -> TrainingResult:
    """Train what requires a gradient of `model` on the task, as long as the course has it; shown in MLflow."""

    def show(step: int, values: Mapping[str, float]) -> None:
        tracker.log(work.run_id, {f"train/{name}": value for name, value in values.items()}, step)

    spec = setting.course.training(setting.config.training, setting.tasks)
    return train(model, tokenizer, work.task, spec, setting.config.seed, show, guard)


def failed_audit(task: Task, audit: AuditResult, outside: str) -> FailedError:
    """The failure of a task that changed weights `outside` of what it trains."""
    changed = ", ".join(audit.changed[:5])
    return FailedError(
        f"task {task.name!r} failed its audit: weights {outside} changed ({changed}); "
        "nothing is recorded, report this as a bug"
    )
