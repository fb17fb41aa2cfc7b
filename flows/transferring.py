"""Transferring: what the registry proposes that a task starts from, and what the probe makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neft.guard import Guard
from neft.neurons import NeuronSet
from neft.protection import Candidates
from neft.routing import Signature
from neft.scoring import Scores
from neft.selection import Budget, Selection, SelectionSpec
from neft.tasks import Task
from neft.training_spec import TrainingSpec
from neft.transfer import Start, decide, start_from
from neft.transfer_spec import TransferSpec
from registry import Entry, Registry
from registry.proposals import Proposal, propose


@dataclass(frozen=True)
class Begun:
    """What a task starts from, the evidence as JSON has it, and one line that says so."""

    start: Start
    evidence: dict[str, Any]
    line: str


@dataclass(frozen=True)
class Transferring:
    """A run's transfer: its registry, the entries that its tasks may start from, and how tasks are learnt."""

    registry: Registry
    entries: Sequence[Entry]
    spec: TransferSpec
    budget: Budget
    selection: SelectionSpec
    training: TrainingSpec
    seed: int

    def begin(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        scores: Scores,
        fresh: Selection,
        found: Candidates,
        chain: Sequence[Entry],
        guard: Callable[[NeuronSet], Guard | None],
        signature: Signature | None = None,
    ) -> Begun:
        """Propose, probe and decide what `task` starts from; `model` is left as it was.

        Args:
            fresh: what the task's own scores choose.
            found: what the protection policy says that the task may choose.
            chain: the entries that the model holds.
        """
        held = {entry.id for entry in chain}
        known = {entry.id: entry for entry in (*self.entries, *(chain if self.spec.source == "auto" else ()))}
        proposals = propose(self.registry, list(known.values()), scores, fresh.neurons, signature)
        starts = [Start("fresh", fresh)]
        # The best that may be started from of each kind: each start costs a probe.
        for kind in ("warm", "share"):
            of_kind = (each for each in proposals if (each.entry.id in held) == (kind == "share"))
            made = (self._start(each, kind == "share", found) for each in of_kind)
            starts += [start for start in [next(filter(None, made), None)] if start is not None]
        evidence: dict[str, Any] = {"proposals": [each.to_dict() for each in proposals]}
        if len(starts) == 1:
            return Begun(
                starts[0], evidence | {"start": "fresh", "source": None}, "starts fresh: nothing to start from"
            )
        decision = decide(model, tokenizer, task, starts, self.training, self.spec.probe_steps, self.seed, guard)
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in decision.losses)
        source = f" from {decision.start.source}" if decision.start.source else ""
        line = f"starts {decision.start.kind}{source}: held-out loss after {self.spec.probe_steps} steps {losses}"
        return Begun(decision.start, evidence | decision.to_dict(), line)

    def _start(self, proposal: Proposal, held: bool, found: Candidates) -> Start | None:
        entry = proposal.entry
        overlay = self.registry.overlay(entry)
        return start_from(overlay, entry.reference, held, found, self.budget, self.selection)
