"""By neurons: a stream's tasks learnt by training a few neurons each, and recorded as entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from peft import get_peft_model
from transformers import PreTrainedModel

from flows.choosing import Choice, Choosing
from flows.identity import task_seed
from flows.learning import Learner, Outcome, Work, failed_audit, fit
from flows.progress import say
from flows.setting import Setting
from flows.standing import Standing
from flows.tracking import Tracker, library_versions
from neft.audit import Audit, state_digest
from neft.errors import FailedError, RecordError
from neft.guard import Guard
from neft.memory import Memory
from neft.neurons import NeuronSet
from neft.overlay import Overlay
from neft.protection import Learnt
from neft.routing import Signature
from neft.scoring import Scores
from neft.tasks import Task
from neft.training import TrainingResult
from neft.tuner import NeftConfig, NeftModel
from registry import Entry, NewEntry, Registry


class ByNeurons(Learner):
    """Scores the neurons for each task, selects a few, trains those alone, and records them."""

    selects: ClassVar[bool] = True

    def __init__(self, setting: Setting, standing: Standing, registry: Registry, tracker: Tracker):
        self._setting, self._standing = setting, standing
        self._registry, self._tracker = registry, tracker
        self._choosing = Choosing(setting, standing, registry, tracker)
        #: What the policy knows of the untouched model.
        self._reserved: NeuronSet = setting.space.none()
        self._before: Sequence[Learnt] = ()
        self._signatures: Sequence[Signature] = ()
        #: What the task on the bench has come to.
        self._scores: Scores
        self._choice: Choice
        self._overlay: Overlay
        self._memory: Memory | None

    # Before the first task

    def reserve(self) -> None:
        """Ask the protection policy for its neurons, once, while the model is still untouched."""
        setting, standing, policy = self._setting, self._standing, self._setting.policy
        self._reserved = policy.reserve(standing.model, standing.tokenizer, setting.space)
        before = policy.before(standing.model, standing.tokenizer, setting.space, setting.config.seed)
        self._before = () if before is None else (before,)
        if self._reserved:
            sites = len(self._reserved.indices)
            say(f"protection policy {policy.name!r} reserves {len(self._reserved):,} neurons in {sites} sites")

    def sign(self) -> Sequence[Signature]:
        setting, standing = self._setting, self._standing
        length = setting.config.training.max_length
        self._signatures = [
            Signature.of(standing.model, standing.tokenizer, task.train, length, task_seed(setting, task))
            for task in setting.tasks
        ]
        return self._signatures

    # One task

    def recall(self, work: Work) -> Entry | None:
        """Lay a recorded overlay on, when this very work was done before; its entry."""
        registry, standing = self._registry, self._standing
        entry = registry.find(work.input_digest)
        if entry is None:
            return None
        try:
            registry.overlay(entry).lay_on(standing.model)
        except FailedError as error:
            work.say(str(error))
            work.say("learning it again, which writes the same files")
            return None
        standing.settle()
        if standing.state != entry.state_digest:
            raise FailedError(
                f"entry {entry.reference} does not give back the state it was recorded with: "
                f"{standing.state[:12]} instead of {entry.state_digest[:12]}; use another NEFT_HOME and "
                "report this as a bug"
            )
        standing.chain.append(entry)
        return entry

    def score(self, work: Work) -> None:
        self._scores = self._choosing.score(work)

    def select(self, work: Work) -> None:
        self._choice = self._choosing.select(
            work, self._scores, self._reserved, self._earlier(), self._signatures[work.position]
        )

    def _earlier(self) -> list[Learnt]:
        """What was learnt so far, as a protection policy sees it, the base model's own abilities first.

        Raises:
            RecordError: a file of an earlier task is missing or altered.
        """
        registry = self._registry
        try:
            return [*self._before] + [
                Learnt(entry.task, registry.neurons(entry), registry.scores(entry), registry.memory(entry))
                for entry in self._standing.chain
            ]
        except FailedError as error:
            raise RecordError(str(error)) from error

    def train(self, work: Work) -> Outcome:
        """Masked SFT on the chosen neurons, then the audit that nothing else has changed."""
        setting, standing, neurons = self._setting, self._standing, self._choice.selection.neurons
        guard = setting.policy.guard(standing.model, neurons, self._earlier())
        before = Overlay.read(standing.model, neurons)
        audit = Audit(standing.model, neurons)
        if self._choice.rows is not None:
            self._choice.rows.lay_on(standing.model)
        result = self._fit(work, neurons, guard)
        self._overlay.lay_on(standing.model)
        found = audit.compare(standing.model)
        if not found.identical:
            before.lay_on(standing.model)
            raise failed_audit(work.task, found, "outside its neuron set")
        length, seed = setting.config.training.max_length, task_seed(setting, work.task)
        self._memory = setting.policy.remember(standing.model, standing.tokenizer, neurons, work.task, length, seed)
        standing.settle()
        return Outcome(result, found)

    def _fit(self, work: Work, neurons: NeuronSet, guard: Guard | None) -> TrainingResult:
        """Train `neurons` alone; what came of it is in the overlay, the model is as it was."""
        standing = self._standing
        peft_model = get_peft_model(standing.model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
        tuner = cast(NeftModel, peft_model.base_model)
        try:
            result = fit(peft_model, standing.tokenizer, work, self._setting, self._tracker, guard)
            self._overlay = tuner.overlay(neurons)
        finally:
            standing.model = cast(PreTrainedModel, tuner.unload())
        return result

    def roll_back(self, work: Work) -> None:
        # Where training ended in the middle, its rows have been taken out already.
        if state_digest(self._standing.model) != self._standing.state:
            self._standing.bring_back(work.task.name, self._lay_chain)

    def _lay_chain(self, model: PreTrainedModel) -> None:
        for entry in self._standing.chain:
            self._registry.overlay(entry).lay_on(model)

    def record(self, work: Work, measured: dict[str, Any], flow_run_id: str | None) -> Entry:
        outcome, standing, config = work.outcome, self._standing, self._setting.config
        assert outcome is not None
        source = self._choice.source
        entry = self._registry.record(
            NewEntry(
                task=work.task.name,
                stream=config.stream,
                base_model=self._setting.base,
                parent=standing.chain[-1] if standing.chain else None,
                reused_from=None if source is None else self._registry.get(source, base_model=self._setting.base),
                input_digest=work.input_digest,
                seed=config.seed,
                data_fingerprint=work.task.train_fingerprint,
                method=config.method.model_dump(mode="json"),
                training=config.training.model_dump(mode="json"),
                neurons=self._choice.selection.neurons,
                overlay=self._overlay,
                scores=self._choice.scores,
                memory=self._memory,
                signature=self._signatures[work.position],
                state_digest=standing.state,
                metrics=measured | self._metrics(work.task, outcome.result),
                audit=outcome.audit.to_dict(),
                versions=library_versions(),
                mlflow_run_id=work.run_id,
                prefect_flow_run_id=flow_run_id,
            )
        )
        standing.chain.append(entry)
        return entry

    def _metrics(self, task: Task, result: TrainingResult) -> dict[str, Any]:
        selection = self._choice.selection
        return {
            "metric": task.metric,
            "majority": task.majority,
            "training_loss": result.loss,
            "training_seconds": result.seconds,
            "training_steps": result.steps,
            "transfer": self._choice.transfer,
            "selection_notes": list(selection.notes),
            "capacity": {name: list(free) for name, free in selection.capacity.items()},
        }
