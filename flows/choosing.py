"""Choosing: the neurons that a task trains, scored, selected, and perhaps started from what is recorded."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flows.capacity import Capacity
from flows.identity import task_seed
from flows.learning import Work
from flows.setting import Setting
from flows.standing import Standing
from flows.tracking import Tracker
from flows.transferring import Transferring
from neft.encoding import batches
from neft.neurons import NeuronSet
from neft.overlay import Overlay
from neft.protection import Candidates, Learnt
from neft.routing import Signature
from neft.scoring import Scores
from neft.selection import Selection, select
from registry import Registry


@dataclass(frozen=True)
class Choice:
    """A task's neurons, and why.

    Attributes:
        rows: what the rows are before training, where the task does not start from the model as it stands.
        source: reference of the entry that the task starts from, if it starts from one.
        transfer: the evidence for what the task starts from, if transfer is on.
    """

    scores: Scores
    selection: Selection
    rows: Overlay | None = None
    source: str | None = None
    transfer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Choosing:
    """How a stream's tasks choose their neurons."""

    setting: Setting
    standing: Standing
    registry: Registry
    tracker: Tracker

    def score(self, work: Work) -> Scores:
        """Score the neurons for the task, on a sample of its training data."""
        setting, standing, config = self.setting, self.standing, self.setting.config
        start = time.perf_counter()
        # Drawn by seed, since a file may be sorted by label.
        seed = task_seed(setting, work.task)
        count = min(config.method.scoring_examples, len(work.task.train)) if setting.scorer.needs_data else 0
        examples = random.Random(seed).sample(work.task.train, count)
        size, length = config.training.per_device_train_batch_size, config.training.max_length
        read = list(batches(standing.tokenizer, examples, size, length))
        scores = setting.scorer.score(standing.model, standing.tokenizer, setting.space, read, seed)
        seconds = time.perf_counter() - start
        self.tracker.log(work.run_id, {"scoring/seconds": seconds, "scoring/examples": len(examples)}, 0)
        work.say(f"scored {len(setting.space):,} neurons by {setting.scorer.name} in {seconds:.1f} s")
        return scores

    def select(
        self,
        work: Work,
        scores: Scores,
        reserved: NeuronSet,
        earlier: Sequence[Learnt],
        signature: Signature,
    ) -> Choice:
        """Choose the task's neurons among those that the protection policy leaves free."""
        method = self.setting.config.method
        found = self.setting.policy.candidates(scores, earlier, reserved)
        fresh = select(found.scores, method.budget, method.selection, found.free, found.when_full, found.lent)
        choice = Choice(scores, fresh)
        if method.transfer.source != "none":
            choice = self._transferred(work, choice, found, earlier, signature)
        self._show(work, choice.selection, earlier)
        return choice

    def _transferred(
        self, work: Work, choice: Choice, found: Candidates, earlier: Sequence[Learnt], signature: Signature
    ) -> Choice:
        """Let the registry propose what to start from, and a short probe decide."""
        setting, standing, method = self.setting, self.standing, self.setting.config.method
        transferring = Transferring(
            self.registry,
            work.sources,
            method.transfer,
            method.budget,
            method.selection,
            setting.config.training,
            task_seed(setting, work.task),
        )
        begun = transferring.begin(
            standing.model,
            standing.tokenizer,
            work.task,
            choice.scores,
            choice.selection,
            found,
            standing.chain,
            lambda neurons: setting.policy.guard(standing.model, neurons, earlier),
            signature,
        )
        start, losses = begun.start, begun.evidence.get("held_out_losses", {})
        self.tracker.log(work.run_id, {f"transfer/{name.replace('@', '.')}": loss for name, loss in losses.items()}, 0)
        self.tracker.tag(work.run_id, {"neft.transfer": f"{start.kind} {start.source or ''}".strip()})
        work.say(begun.line)
        return replace(choice, selection=start.selection, rows=start.rows, source=start.source, transfer=begun.evidence)

    def _show(self, work: Work, selection: Selection, earlier: Sequence[Learnt]) -> None:
        """Show the choice, and what it leaves free, in MLflow, and say it."""
        neurons, capacity = selection.neurons, Capacity.of(selection, self.setting.space)
        site, share = capacity.fullest
        for note in selection.notes:
            work.say(note)
        self.tracker.log_neurons(work.run_id, neurons)
        self.tracker.log_table(work.run_id, capacity.table(), "capacity.json")
        numbers: dict[str, float] = {
            "selection/neurons": len(neurons),
            "selection/parameters": neurons.parameters,
            "selection/free_before": selection.free,
            "capacity/free": capacity.left,
            "capacity/fullest_site_free": share,
        }
        numbers |= {f"selection/iou/{learnt.task}": neurons.iou(learnt.neurons) for learnt in earlier if learnt.neurons}
        self.tracker.log(work.run_id, numbers, 0)
        work.say(
            f"chose {len(neurons):,} of {selection.free:,} free neurons "
            f"({neurons.parameter_fraction:.1%} of the model's parameters); {capacity.left:,} stay free, "
            f"in the fullest site, {site}, {share:.0%} of its own"
        )
