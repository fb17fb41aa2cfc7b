"""The workbench: what a stream run holds in memory while its flow goes on, and the work of each step."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.config import StreamConfig
from flows.costs import Costs
from flows.courses import COURSES, Sequential
from flows.failures import Skipped, skipped_in, with_skipped
from flows.figures import heatmap
from flows.identity import Base, config_digest, digest, evaluation_identity, method_identity
from flows.modes import Modes, prove
from flows.progress import say
from flows.tracking import Tracker, library_versions
from flows.transferring import Transferring
from neft.audit import Audit, AuditResult, WeightAudit, state_digest, trained_weights
from neft.baselines import BASELINES, Baseline
from neft.encoding import batches
from neft.errors import FailedError, NeftError, RecordError
from neft.evaluation import Probe, evaluate, load_probes, perplexity
from neft.forgetting import AccuracyMatrix, general_delta
from neft.guard import Guard
from neft.harness import HarnessProbe, load_harness
from neft.memory import Memory
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.protection import POLICIES, Candidates, Learnt, ProtectionPolicy
from neft.routing import Signature
from neft.scoring import SCORERS, Scorer, Scores
from neft.selection import Selection, select
from neft.states import States
from neft.strategies import build
from neft.tasks import Task, load_task
from neft.training import TrainingResult, train
from neft.tuner import NeftConfig, NeftModel
from registry import Entry, Evaluation, NewEntry, Registry, Run
from registry.proposals import eligible

#: A value, how many examples it was computed from, and what else is worth keeping.
_Measurement = tuple[float, int, dict[str, Any]]


@dataclass
class Work:
    """One task on the bench: what its steps have made so far."""

    position: int
    task: Task
    input_digest: str
    run_id: str = ""
    scores: Scores | None = None
    selection: Selection | None = None
    candidates: Candidates | None = None
    begun_from: Overlay | None = None
    transfer: Mapping[str, Any] | None = None
    overlay: Overlay | None = None
    audit: AuditResult | None = None
    memory: Memory | None = None
    result: TrainingResult | None = None
    state: str = ""
    #: The weights before the task, where no entries can give them back.
    before: dict[str, torch.Tensor] | None = None


class Workbench:
    """The model as it stands, the stream's tasks, and where the run is recorded and shown.

    Prefect's tasks call its methods by name, so that no model ever passes through Prefect.
    """

    def __init__(self, config: StreamConfig, registry: Registry, tracker: Tracker, flow_run_id: str | None):
        self.config, self.registry, self.tracker = config, registry, tracker
        self.flow_run_id = flow_run_id
        self.model: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.tasks: tuple[Task, ...] = ()
        self.lessons: tuple[Task, ...] = ()
        self.course: Sequential
        self.probes: tuple[Probe, ...] = ()
        self.harness: tuple[HarnessProbe, ...] = ()
        self.space: NeuronSpace
        self.scorer: Scorer
        self.policy: ProtectionPolicy
        self.baseline: Baseline | None
        self.reserved: NeuronSet
        self.before: Learnt | None = None
        self.identity: Base
        self.base = ""
        self.state = ""
        self.run: Run
        self.matrix: AccuracyMatrix
        self.modes: Modes
        self.signatures: list[Signature] = []
        #: For each row of the R matrix and each task, the values of the task's examples.
        self.values: list[list[list[float]]] = []
        self.general: list[dict[str, float]] = []
        self.sources: Sequence[Entry] = ()
        self.chain: list[Entry] = []
        self.skipped: list[Skipped] = []
        self._work: Work | None = None
        self._costs = Costs()

    # Before the first task

    def load(self) -> None:
        """Load data and model, and find the neurons. Data comes first: its mistakes are found in a second."""
        start = time.perf_counter()
        self.tasks = tuple(load_task(spec, self.config.seed) for spec in self.config.tasks)
        self.probes = load_probes(self.config.evaluation)
        self.harness = load_harness(self.config.evaluation)
        self.scorer = build("scorer", SCORERS, self.config.method.scorer)
        self.policy = build("protection policy", POLICIES, self.config.method.protection)
        chosen = self.config.method.baseline
        self.baseline = build("baseline", BASELINES, chosen) if chosen is not None else None
        self.course = COURSES[self.baseline.course if self.baseline is not None else "sequential"]()
        self.lessons = self.course.lessons(self.tasks)
        self._load_base()
        self.config.check_lengths(getattr(self.model.config, "max_position_embeddings", None))
        self.space = NeuronSpace.from_model(self.model, self.config.method.kinds, self.config.model.neurons)
        self.identity = Base.of(self.model, self.tokenizer, self.space)
        self.base = self.identity.model
        self.state = state_digest(self.model)
        self.course.open(self.model)
        self.matrix = AccuracyMatrix(
            tuple(task.name for task in self.tasks), (), tuple(len(task.eval) for task in self.tasks)
        )
        say(
            f"loaded {self.config.model.name} ({self.space.model_parameters:,} parameters, {len(self.space):,} neurons "
            f"in {len(self.space.sites)} sites) and {len(self.tasks)} tasks in {time.perf_counter() - start:.1f} s"
        )
        majorities = [f"{task.name} {task.majority:.3f}" for task in self.tasks if task.majority is not None]
        if majorities:
            say(f"always answering the commonest label scores: {', '.join(majorities)}")

    def _load_base(self) -> None:
        self.model, self.tokenizer = load_base(self.config.model.name, self.config.model.dtype)
        nn.Module.to(self.model, torch.accelerator.current_accelerator() or torch.device("cpu"))

    def reserve(self) -> None:
        """Ask the protection policy for its neurons, once, while the model is still untouched."""
        self.reserved, self.before = self.space.none(), None
        if self.config.method.baseline is None:
            self.reserved = self.policy.reserve(self.model, self.tokenizer, self.space)
            self.before = self.policy.before(self.model, self.tokenizer, self.space, self.config.seed)
        if self.reserved:
            sites = len(self.reserved.indices)
            say(f"protection policy {self.policy.name!r} reserves {len(self.reserved):,} neurons in {sites} sites")

    def sign(self) -> None:
        """Make every task's signature, while the model is still untouched, as it is when a router reads a request."""
        modes = self.config.evaluation.modes
        if self.config.method.baseline is not None:
            # A baseline leaves no state to go back to.
            self.modes = Modes(("consolidated",), self.matrix)
            return
        start = time.perf_counter()
        length = self.config.training.max_length
        self.modes = Modes(modes, self.matrix)
        self.signatures = [
            Signature.of(self.model, self.tokenizer, task.train, length, self._task_seed(task)) for task in self.tasks
        ]
        if "routed" in modes:
            self.modes.read(self.model, self.tokenizer, self.tasks, self.signatures)
        say(f"made the signatures of {len(self.tasks)} tasks in {time.perf_counter() - start:.1f} s")

    @property
    def config_digest(self) -> str:
        """Identity of what this run computes: by content, not by the names of files."""
        probes: tuple[Probe | HarnessProbe, ...] = (*self.probes, *self.harness)
        return config_digest(self.config, self.identity, self.tasks, self.scorer, self.policy, probes)

    def _method(self) -> dict[str, Any]:
        return self.config.method.model_dump(mode="json")

    def _training(self) -> dict[str, Any]:
        return self.config.training.model_dump(mode="json")

    def _evaluation(self) -> dict[str, Any]:
        return evaluation_identity(self.config)

    def open_run(self) -> bool:
        """Begin this run, or go on with it where it stopped; False when it is finished already."""
        stream, identity = self.config.stream, self.config_digest
        finished = self.registry.finished_run(stream, identity)
        if finished is not None:
            self.run, self.skipped = finished, list(skipped_in(finished))
            return False
        self.registry.add_base_model(
            self.base,
            self.config.model.name,
            self.config.model.dtype,
            json.loads(self.model.config.to_json_string()),
            self.space.model_parameters,
        )
        left = self.registry.unfinished_run(stream, identity)
        if left is not None:
            say(f"going on with run {left.id} of stream {stream!r}, which stopped before its end")
        last = self._find_sources(left)
        # The registry comes first: an MLflow run that it does not know would stay open for ever.
        self.run = left or self.registry.start_run(
            stream=stream,
            config_digest=identity,
            config=self.config.model_dump(mode="json"),
            tasks=[task.name for task in self.tasks],
        )
        recorded = {entry.mlflow_run_id for entry in self.registry.list(stream) if entry.mlflow_run_id}
        recorded |= {each.mlflow_run_id for each in skipped_in(self.run) if each.mlflow_run_id}
        run_id = self.tracker.start(
            stream, self._params(), self._tags(), left.mlflow_run_id if left else None, recorded
        )
        self.run = self.registry.update_run(
            self.run.id,
            status="running",
            mlflow_run_id=run_id,
            tracking={
                **(self.run.tracking or {}),
                "uri": self.tracker.uri,
                "experiment_id": self.tracker.experiment_id,
                "last_entry": last,
            },
            prefect_flow_run_id=self.flow_run_id,
        )
        return True

    def _find_sources(self, left: Run | None) -> int:
        """Find the entries that tasks may start from; the id of the last that was there when the run first began."""
        known = (left.tracking or {}) if left is not None else {}
        last: int = known.get("last_entry", max((entry.id for entry in self.registry.list()), default=0))
        source = self.config.method.transfer.source
        if source != "none":
            self.sources = eligible(self.registry, self.config.stream, self.base, self.space, last, source)
        return last

    def _params(self) -> dict[str, Any]:
        method = self._method()
        named = {f"method.{key}": value for key, value in method.items()}
        named |= {f"training.{key}": value for key, value in self._training().items()}
        named |= {f"evaluation.{key}": value for key, value in self._evaluation().items()}
        # What chance gives, for whoever reads MLflow alone.
        named |= {f"majority.{task.name}": task.majority for task in self.tasks if task.majority is not None}
        return named | {
            "stream": self.config.stream,
            "model.name": self.config.model.name,
            "model.dtype": self.config.model.dtype,
            "tasks": ", ".join(task.name for task in self.tasks),
            "seed": self.config.seed,
        }

    def _tags(self) -> dict[str, str]:
        versions = {f"neft.version.{name}": number for name, number in library_versions().items()}
        known = {
            "neft.stream": self.config.stream,
            "neft.seed": str(self.config.seed),
            "neft.base_model": self.base,
            "neft.config_digest": self.config_digest,
            "neft.prefect_flow_run": self.flow_run_id or "",
        }
        return versions | known | self.config.tracking.tags

    # One task

    @property
    def work(self) -> Work:
        """The task on the bench."""
        assert self._work is not None
        return self._work

    def begin(self, position: int) -> None:
        """Put a task on the bench, in place of the one before."""
        task = self.lessons[position]
        self.course.begin(self.model)
        inputs: dict[str, Any] = {
            **self.identity.to_dict(),
            "parent": self.state,
            "task": task.name,
            "data": task.train_fingerprint,
            "method": method_identity(self.config.method, self.scorer, self.policy),
            "training": self._training(),
            "seed": self.config.seed,
        }
        if self.sources:
            inputs["sources"] = [entry.input_digest for entry in self.sources]
        self._work = Work(position, task, digest(inputs))
        if self.config.method.baseline is not None and self.config.on_failure == "skip":
            self._work.before = {name: tensor.cpu().clone() for name, tensor in self.model.state_dict().items()}

    def recall(self) -> bool:
        """Lay a recorded overlay on, when this very work was done before; True if so."""
        work = self.work
        entry = None if self.config.method.baseline else self.registry.find(work.input_digest)
        if entry is None:
            return False
        try:
            # The neuron file is read too: a later task's protection needs it.
            self.registry.neurons(entry)
            self.registry.overlay(entry).lay_on(self.model)
        except FailedError as error:
            say(f"{self._head()} {error}")
            say(f"{self._head()} learning it again, which writes the same files")
            return False
        self.state = state_digest(self.model)
        if self.state != entry.state_digest:
            raise FailedError(
                f"entry {entry.reference} does not give back the state it was recorded with: "
                f"{self.state[:12]} instead of {entry.state_digest[:12]}; use another NEFT_HOME and "
                "report this as a bug"
            )
        self.chain.append(entry)
        self._costs.training_seconds += entry.metrics.get("training_seconds", 0.0)
        self.tracker.close_recorded(entry.mlflow_run_id)
        say(f"{self._head()} recorded as {entry.reference}, not learnt again")
        return True

    def recall_skipped(self) -> bool:
        """Leave the task out, when a run of this stream has tried this very work before and left it out; True if so."""
        known = [each for run in self.registry.runs(self.config.stream) for each in skipped_in(run)]
        found = [each for each in known if each.input_digest == self.work.input_digest]
        if self.config.on_failure != "skip" or not found:
            return False
        self._leave_out(found[-1])
        say(f"{self._head()} skipped before, and not tried again before its config changes: {found[-1].error}")
        return True

    def roll_back(self) -> None:
        """Bring the model back, bit for bit, to what it was before the task.

        Raises:
            RecordError: the entries before it do not give that state back.
        """
        work, lost = self.work, self.config.method.baseline is not None and self.work.before is None
        # Where training ended in the middle, its rows have been taken out already.
        if lost or (work.before is None and state_digest(self.model) == self.state):
            return
        self._load_base()
        if work.before is not None:
            self.model.load_state_dict(work.before)
        for entry in self.chain:
            self.registry.overlay(entry).lay_on(self.model)
        if state_digest(self.model) != self.state:
            raise RecordError(
                f"task {work.task.name!r} failed, and the model cannot be brought back to what it was before; "
                "run the same command again to go on from what is recorded"
            )

    def may_skip(self, error: NeftError) -> bool:
        """Whether the stream goes on after a task failed: if it is to, and the records are not what failed."""
        return self.config.on_failure == "skip" and not isinstance(error, RecordError)

    def skip(self, error: NeftError) -> None:
        """Leave the task out, and say so in every record."""
        work, reason = self.work, _reason(error)
        self.tracker.tag(work.run_id, {"neft.error": reason})
        self.tracker.finish(work.run_id, finished=False)
        self._leave_out(Skipped(work.task.name, work.input_digest, reason, work.run_id))
        say(f"{self._head()} skipped: {reason}")
        self._work = None

    def _leave_out(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self.run = self.registry.update_run(self.run.id, tracking=with_skipped(self.run.tracking, self.skipped))

    def _head(self) -> str:
        work = self.work
        return f"[{work.position + 1}/{len(self.lessons)}] {work.task.name}:"

    def open_task(self) -> None:
        """Begin the task's MLflow run."""
        work = self.work
        params = {"task": work.task.name, "position": work.position + 1, "metric": work.task.metric}
        params |= {"train_examples": len(work.task.train), "eval_examples": len(work.task.eval)}
        work.run_id = self.tracker.start_task(
            work.task, params, {"neft.stream": self.config.stream, "neft.seed": str(self.config.seed)}
        )

    def score(self) -> None:
        """Score the neurons for the task, on a sample of its training data."""
        work = self.work
        start = time.perf_counter()
        # Drawn by seed, since a file may be sorted by label.
        seed = self._task_seed(work.task)
        count = min(self.config.method.scoring_examples, len(work.task.train)) if self.scorer.needs_data else 0
        examples = random.Random(seed).sample(work.task.train, count)
        size, length = self.config.training.per_device_train_batch_size, self.config.training.max_length
        read = list(batches(self.tokenizer, examples, size, length))
        work.scores = self.scorer.score(self.model, self.tokenizer, self.space, read, seed)
        seconds = time.perf_counter() - start
        self.tracker.log(work.run_id, {"scoring/seconds": seconds, "scoring/examples": len(examples)}, 0)
        say(f"{self._head()} scored {len(self.space):,} neurons by {self.scorer.name} in {seconds:.1f} s")

    def _task_seed(self, task: Task) -> int:
        """Another seed for each task, or chance would repeat itself."""
        return int(digest([self.config.seed, task.name])[:8], 16)

    def select(self) -> None:
        """Choose the task's neurons among those that the protection policy leaves free."""
        work = self.work
        assert work.scores is not None
        earlier = self._earlier()
        found = work.candidates = self.policy.candidates(work.scores, earlier, self.reserved)
        method = self.config.method
        work.selection = select(found.scores, method.budget, method.selection, found.free, found.when_full, found.lent)
        if method.transfer.source != "none":
            self._transfer()
        neurons = work.selection.neurons
        for note in work.selection.notes:
            say(f"{self._head()} {note}")
        self.tracker.log_neurons(work.run_id, neurons)
        sizes: dict[str, float] = {
            "selection/neurons": len(neurons),
            "selection/parameters": neurons.parameters,
            "selection/free_before": work.selection.free,
        }
        sizes |= {f"selection/iou/{learnt.task}": neurons.iou(learnt.neurons) for learnt in earlier if learnt.neurons}
        self.tracker.log(work.run_id, sizes, 0)
        say(
            f"{self._head()} chose {len(neurons):,} of {work.selection.free:,} free neurons "
            f"({neurons.parameter_fraction:.1%} of the model's parameters)"
        )

    def _transfer(self) -> None:
        """Let the registry propose what to start from, and a short probe decide."""
        work, method = self.work, self.config.method
        assert work.scores is not None and work.selection is not None and work.candidates is not None
        seed = self._task_seed(work.task)
        transferring = Transferring(
            self.registry, self.sources, method.transfer, method.budget, method.selection, self.config.training, seed
        )
        earlier = self._earlier()
        begun = transferring.begin(
            self.model,
            self.tokenizer,
            work.task,
            work.scores,
            work.selection,
            work.candidates,
            self.chain,
            lambda neurons: self.policy.guard(self.model, neurons, earlier),
        )
        work.selection, work.begun_from, work.transfer = begun.start.selection, begun.start.rows, begun.evidence
        losses = begun.evidence.get("held_out_losses", {})
        self.tracker.log(work.run_id, {f"transfer/{name.replace('@', '.')}": loss for name, loss in losses.items()}, 0)
        self.tracker.tag(work.run_id, {"neft.transfer": f"{begun.start.kind} {begun.start.source or ''}".strip()})
        say(f"{self._head()} {begun.line}")

    def _earlier(self) -> list[Learnt]:
        """What was learnt so far, as a protection policy sees it, the base model's own abilities first.

        Raises:
            RecordError: a file of an earlier task is missing or altered.
        """
        first, registry = [] if self.before is None else [self.before], self.registry
        try:
            return first + [
                Learnt(entry.task, registry.neurons(entry), registry.scores(entry), registry.memory(entry))
                for entry in self.chain
            ]
        except FailedError as error:
            raise RecordError(str(error)) from error

    def train(self) -> None:
        """Masked SFT on the chosen neurons, then the audit that nothing else has changed."""
        work = self.work
        assert work.selection is not None
        neurons = work.selection.neurons
        guard = self.policy.guard(self.model, neurons, self._earlier())
        before = Overlay.read(self.model, neurons)
        audit = Audit(self.model, neurons)
        if work.begun_from is not None:
            work.begun_from.lay_on(self.model)
        peft_model = get_peft_model(self.model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
        tuner = cast(NeftModel, peft_model.base_model)
        try:
            work.result = self._fit(peft_model, guard)
            work.overlay = tuner.overlay(neurons)
        finally:
            self.model = cast(PreTrainedModel, tuner.unload())
        work.overlay.lay_on(self.model)
        work.audit = audit.compare(self.model)
        if not work.audit.identical:
            before.lay_on(self.model)
            raise self._failed_audit(work.audit, "outside its neuron set")
        length = self.config.training.max_length
        work.memory = self.policy.remember(
            self.model, self.tokenizer, neurons, work.task, length, self._task_seed(work.task)
        )
        self._trained()

    def train_baseline(self) -> None:
        """Learn the task by the configured baseline."""
        work = self.work
        assert self.baseline is not None
        audit, seed = WeightAudit(self.model), self._task_seed(work.task)
        prepared = self.baseline.prepare(self.model, seed)
        trained = trained_weights(prepared)
        work.result = self._fit(prepared, self.baseline.guard(prepared))
        self.model = cast(PreTrainedModel, self.baseline.finish(prepared))
        work.audit = audit.compare(self.model, trained)
        if not work.audit.identical:
            raise self._failed_audit(work.audit, "that its baseline does not train")
        self.baseline.remember(self.model, self.tokenizer, work.task, self.config.training.max_length, seed)
        self._trained()

    def _failed_audit(self, audit: AuditResult, outside: str) -> FailedError:
        changed = ", ".join(audit.changed[:5])
        return FailedError(
            f"task {self.work.task.name!r} failed its audit: weights {outside} changed ({changed}); "
            "nothing is recorded, report this as a bug"
        )

    def _fit(self, model: nn.Module, guard: Guard | None = None) -> TrainingResult:
        work = self.work

        def show(step: int, values: Mapping[str, float]) -> None:
            self.tracker.log(work.run_id, {f"train/{name}": value for name, value in values.items()}, step)

        spec = self.course.training(self.config.training, self.tasks)
        return train(model, self.tokenizer, work.task, spec, self.config.seed, show, guard)

    def _trained(self) -> None:
        work = self.work
        assert work.result is not None
        self._costs.training_seconds += work.result.seconds
        self.state = work.state = state_digest(self.model)
        outside = work.audit.parameters_outside if work.audit is not None else 0
        audited = f", {outside:,} other parameters bit-identical" if outside else ""
        say(
            f"{self._head()} trained {work.result.steps} steps in {work.result.seconds:.1f} s, "
            f"mean loss {work.result.loss:.3f}{audited}"
        )

    # Every state

    def evaluate(self) -> None:
        """Measure the model as it stands on tasks, as the course has it, and on every probe: the R matrix grows."""
        found: dict[int, Evaluation] = {}

        def measure(place: int) -> float:
            task = self.tasks[place]
            found[place] = self._measured(task.name, task.metric, task.eval_fingerprint, self._score(task))
            return found[place].value

        self.matrix = self.course.measured(self.matrix, measure)
        learnt = self.matrix.learnt
        probes = {
            f"perplexity/{probe.name}": self._measured(
                probe.name, "perplexity", probe.fingerprint, self._perplexity(probe)
            ).value
            for probe in self.probes
        }
        probes |= {
            f"harness/{probe.name}": self._measured(
                probe.name, "harness", probe.fingerprint, self._harness(probe)
            ).value
            for probe in self.harness
        }
        if self.modes.matrices:
            self.values.append([found[place].details["values"] for place in range(len(self.tasks))])
            self.modes.add(self.values[-1])
        self.general.append(probes)
        row = zip(self.tasks, self.matrix.rows[-1], strict=True)
        scored = [(task, score) for task, score in row if score is not None]
        shown = {f"{task.metric}/{task.name}": score for task, score in scored}
        shown |= {f"continual/{name}": value for name, value in self.metrics().items()}
        shown |= probes | self.modes.metrics()
        self.tracker.log_row(shown, learnt)
        matrices = {mode: matrix.to_dict() for mode, matrix in self.modes.matrices.items()}
        self.run = self.registry.update_run(
            self.run.id,
            matrix=self.matrix.to_dict() | {"modes": matrices},
            metrics=self.metrics() | self.modes.metrics(),
        )
        said = ", ".join(f"{task.name} {score:.3f}" for task, score in scored)
        say(f"{'untouched model' if learnt == 0 else f'after {learnt} of {len(self.tasks)}'}: {said}")

    def _score(self, task: Task) -> Callable[[], _Measurement]:
        def measure() -> _Measurement:
            score = evaluate(self.model, self.tokenizer, task, self.config.evaluation_spec)
            return score.value, score.examples, {"values": list(score.values)}

        return measure

    def _perplexity(self, probe: Probe) -> Callable[[], _Measurement]:
        return lambda: (perplexity(self.model, self.tokenizer, probe), probe.tokens, {})

    def _harness(self, probe: HarnessProbe) -> Callable[[], _Measurement]:
        def measure() -> _Measurement:
            accuracy, examples = probe.accuracy(self.model, self.tokenizer)
            return accuracy, examples, {}

        return measure

    def _measured(self, name: str, metric: str, fingerprint: str, measure: Callable[[], _Measurement]) -> Evaluation:
        """A score of this very state on this very data: measured, unless this run did so before it was interrupted."""
        identity = digest([self.run.id, fingerprint, metric, self._evaluation(), self.config.training.max_length])
        known = self.registry.evaluation(self.state, identity)
        if known is not None:
            return known
        start = time.perf_counter()
        value, examples, details = measure()
        return self.registry.record_evaluation(
            state_digest=self.state,
            data_digest=identity,
            task=name,
            metric=metric,
            value=value,
            examples=examples,
            details={"seconds": time.perf_counter() - start, **details},
        )

    def metrics(self) -> dict[str, float]:
        """The continual-learning metrics so far, by the names in `neft.forgetting.FORMULAS`."""
        found = self.matrix.metrics()
        if (self.probes or self.harness) and len(self.general) > 1 and self.course.accumulates:
            found["general_delta"] = general_delta(self.general[0], self.general[-1])
        return found

    # After each task, and at the end

    def record(self) -> None:
        """Record the entry; a baseline has none. The task's MLflow run ends."""
        work = self.work
        assert work.result is not None and work.audit is not None
        row = dict(zip(self.matrix.tasks, self.matrix.rows[-1], strict=True))
        if work.overlay is not None and work.selection is not None:
            entry = self.registry.record(
                NewEntry(
                    task=work.task.name,
                    stream=self.config.stream,
                    base_model=self.base,
                    parent=self.chain[-1] if self.chain else None,
                    input_digest=work.input_digest,
                    seed=self.config.seed,
                    data_fingerprint=work.task.train_fingerprint,
                    method=self._method(),
                    training=self._training(),
                    neurons=work.selection.neurons,
                    overlay=work.overlay,
                    scores=work.scores,
                    memory=work.memory,
                    signature=self.signatures[work.position],
                    state_digest=work.state,
                    metrics={
                        "scores": row,
                        "metric": work.task.metric,
                        "majority": work.task.majority,
                        "continual": self.metrics(),
                        "general": self.general[-1],
                        "training_loss": work.result.loss,
                        "training_seconds": work.result.seconds,
                        "training_steps": work.result.steps,
                        "transfer": work.transfer,
                        "selection_notes": list(work.selection.notes),
                        "capacity": {name: list(free) for name, free in work.selection.capacity.items()},
                    },
                    audit=work.audit.to_dict(),
                    versions=library_versions(),
                    mlflow_run_id=work.run_id,
                    prefect_flow_run_id=self.flow_run_id,
                )
            )
            self.chain.append(entry)
            self.tracker.tag(work.run_id, {"neft.entry": entry.reference})
            say(f"{self._head()} recorded as {entry.reference}")
        self.tracker.tag(work.run_id, {"neft.audit.identical": str(work.audit.identical).lower()})
        if (score := row.get(work.task.name)) is not None:
            self.tracker.log(work.run_id, {f"eval/{work.task.metric}": score}, work.result.steps)
        self.tracker.finish(work.run_id)
        self._work = None

    def prove(self) -> None:
        """Check out every state that the oracle goes back to, and measure it again."""
        # The model has served its turn, and a second one may not fit beside it.
        del self.model
        self._load_base()
        states = States(self.model, {entry.reference: self.registry.overlay(entry) for entry in self.chain})
        # A task that was skipped has a row of the R matrix, but no entry.
        places = {task.name: place for place, task in enumerate(self.tasks)}
        expected = {entry.reference: self.values[places[entry.task] + 1][places[entry.task]] for entry in self.chain}

        def measure(entry: Entry) -> Sequence[float]:
            task = self.tasks[places[entry.task]]
            return evaluate(self.model, self.tokenizer, task, self.config.evaluation_spec).values

        prove(states, [(entry, expected[entry.reference]) for entry in self.chain], measure)
        say(f"checked out all {len(self.chain)} states again: same weights, same scores")

    def finish(self) -> None:
        """End the run: each mode's matrix as a table, and that of the newest states as a picture."""
        self._log_matrix(self.matrix, "r_matrix.json")
        for mode, matrix in self.modes.matrices.items():
            self._log_matrix(matrix, f"r_matrix_{mode}.json")
        self.tracker.log_figure(heatmap(self.matrix, f"R matrix of {self.config.stream}"), "r_matrix.png")
        costs = self._costs.metrics(self.chain, self.baseline, len(self.tasks))
        self.tracker.log(self.tracker.run_id, costs, len(self.tasks))
        self.tracker.tag(
            self.tracker.run_id,
            {"neft.entries": ", ".join(entry.reference for entry in self.chain)},
        )
        # The registry comes last: a run that it calls finished is never opened again.
        self.tracker.finish(self.tracker.run_id)
        tracking = with_skipped(self.run.tracking, self.skipped)
        tracking["entries"] = [entry.reference for entry in self.chain]
        self.run = self.registry.update_run(self.run.id, status="finished", tracking=tracking)

    def _log_matrix(self, matrix: AccuracyMatrix, name: str) -> None:
        skipped = {each.task for each in self.skipped}
        rows = ["untouched", *(f"after {task}{' (skipped)' * (task in skipped)}" for task in matrix.tasks)]
        table: dict[str, list[Any]] = {"state": rows}
        for place, task in enumerate(matrix.tasks):
            table[task] = [row[place] for row in matrix.rows]
        self.tracker.log_table(table, name)

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
