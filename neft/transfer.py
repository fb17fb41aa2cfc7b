"""Transfer: what a task starts from (fresh neurons, an earlier task's rows, its neurons shared), by a short probe."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neft.encoding import batches
from neft.errors import InputError
from neft.guard import Guard
from neft.losses import completion_loss
from neft.modes import in_evaluation
from neft.neurons import NeuronSet
from neft.overlay import Overlay
from neft.protection.policy import Candidates
from neft.scoring.scores import Scores
from neft.selection import Budget, Selection, SelectionSpec, select
from neft.tasks import Example, Task
from neft.training import train
from neft.training_spec import TrainingSpec
from neft.tuner import NeftConfig, NeftModel

#: Rows held out of the training data for the probe: at most so many, and at most this share.
HELD_OUT, HELD_OUT_SHARE = 32, 0.25

#: An advantage below so many of its standard errors is noise.
NOISE = 2.0

Kind = Literal["fresh", "warm", "share"]


@dataclass(frozen=True)
class Start:
    """Where a task's training may begin.

    `fresh` is what the task's own scores choose. `warm` takes the neurons of an entry that the model does not hold,
    and begins with that entry's rows. `share` trains on neurons of an entry that the model does hold.

    Attributes:
        rows: what is laid on before training; None for what the model holds.
        source: reference of the entry; None for `fresh`.
    """

    kind: Kind
    selection: Selection
    rows: Overlay | None = None
    source: str | None = None


def start_from(
    overlay: Overlay, source: str, held: bool, found: Candidates, budget: Budget, spec: SelectionSpec
) -> Start | None:
    """The start from an entry: its neurons as far as the protection policy has them free, filled up to the budget.

    Args:
        overlay: the entry's.
        source: its reference.
        held: whether the model holds the entry, so that its neurons are shared, where they are free or lent.
        found: what the policy says that the task may choose.

    Returns:
        None where none of the entry's neurons may be chosen.
    """
    free = found.free
    if held and found.lent is not None:
        free = free | (overlay.neurons & found.lent.neurons)
    allowed = NeuronSet(free.space, {site.name: free[site.name] for site in spec.sites(free.space)})
    wanted = overlay.neurons & allowed
    if not wanted:
        return None
    selection = select(_first(found.scores, wanted), budget, spec, free, found.when_full, found.lent)
    taken = selection.neurons & wanted
    if not taken:
        return None
    return Start("share" if held else "warm", selection, None if held else _part(overlay, taken), source)


def _first(scores: Scores, wanted: NeuronSet) -> Scores:
    """The scores with those of `wanted` raised above all others."""
    lift = max(float(values.max()) for values in scores.values.values())
    lift -= min(float(values.min()) for values in scores.values.values())
    raised = {}
    for name, values in scores.values.items():
        raised[name] = values.clone()
        raised[name][torch.from_numpy(wanted[name].copy())] += 2 * lift + 1
    return Scores(scores.space, raised)


def _part(overlay: Overlay, neurons: NeuronSet) -> Overlay:
    """The rows of some of an overlay's neurons."""
    whole, values = overlay.neurons.rows(), {}
    for name, rows in neurons.rows().items():
        place = np.searchsorted(whole[name].positions, rows.positions)
        values[name] = overlay.values[name][torch.from_numpy(place)]
    return Overlay(neurons, values)


@dataclass(frozen=True)
class Decision:
    """Which start was taken, and each start's held-out loss after the probe, by kind and source."""

    start: Start
    losses: tuple[tuple[str, float], ...]
    advantage: float
    noise: float

    def to_dict(self) -> dict[str, Any]:
        """The decision as JSON has it."""
        return {
            "start": self.start.kind,
            "source": self.start.source,
            "held_out_losses": dict(self.losses),
            "advantage": self.advantage,
            "noise": self.noise,
        }


def decide(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    starts: Sequence[Start],
    training: TrainingSpec,
    steps: int,
    seed: int,
    guard: Callable[[NeuronSet], Guard | None],
) -> Decision:
    """Train each start for a few steps, and take the one with the lowest loss on rows held out of the training data.

    A start takes the place of the first, `fresh`, where its advantage is more than noise: above twice its standard
    error over the held-out rows. The model is left as it was, bit for bit.

    Raises:
        InputError: the task has too few rows to hold any out.
    """
    kept, held_out = hold_out(task, seed)
    short = training.model_copy(
        update={"max_steps": steps, "early_stopping_patience": None, "cache_frozen_layers": False}
    )
    losses = [
        probe(model, tokenizer, replace(task, train=kept), start, short, seed, guard, held_out) for start in starts
    ]
    means = [float(values.mean()) for values in losses]
    best = min(range(len(starts)), key=lambda place: (means[place], place))
    gained = losses[0] - losses[best]
    advantage = float(gained.mean())
    noise = NOISE * float(gained.std()) / math.sqrt(len(gained))
    taken = starts[best] if best and advantage > noise else starts[0]
    named = tuple(
        (start.kind if start.source is None else f"{start.kind} {start.source}", mean)
        for start, mean in zip(starts, means, strict=True)
    )
    return Decision(taken, named, advantage, noise)


def hold_out(task: Task, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training rows to probe with, and those to measure on, drawn by seed.

    Raises:
        InputError: fewer than eight rows.
    """
    count = min(HELD_OUT, int(len(task.train) * HELD_OUT_SHARE))
    if count < 2:
        raise InputError(
            f"method.transfer holds rows out of task {task.name!r} to compare starts, which has {len(task.train)} in "
            "all; give it eight or more, or set method.transfer to none"
        )
    order = random.Random(seed).sample(range(len(task.train)), len(task.train))
    rows = [task.train[place] for place in order]
    return tuple(rows[count:]), tuple(rows[:count])


def probe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    start: Start,
    training: TrainingSpec,
    seed: int,
    guard: Callable[[NeuronSet], Guard | None],
    held_out: Sequence[Example],
) -> torch.Tensor:
    """Loss of each held-out row (rows,), float64, after training from `start`; the model is left as it was."""
    neurons = start.selection.neurons
    beside, before = guard(neurons), Overlay.read(model, neurons)
    try:
        if start.rows is not None:
            start.rows.lay_on(model)
        adapted = get_peft_model(cast(PreTrainedModel, model), NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
        try:
            train(adapted, tokenizer, task, training, seed, guard=beside)
            return row_losses(adapted, tokenizer, held_out, training.max_length)
        finally:
            cast(NeftModel, adapted.base_model).unload()
    finally:
        before.lay_on(model)


@torch.no_grad()
def row_losses(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> torch.Tensor:
    """Mean loss of each example's completion tokens (examples,), float64."""
    device, found = next(model.parameters()).device, []
    with in_evaluation(model):
        for batch in batches(tokenizer, examples, 1, max_length):
            total, count = completion_loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
            found.append(float(total / count))
    return torch.tensor(found, dtype=torch.float64)
