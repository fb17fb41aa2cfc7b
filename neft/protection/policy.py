"""What a protection policy is: it says what a new task may choose and change, given what earlier tasks learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.guard import Guard
from neft.memory import Memory
from neft.neurons import NeuronSet, NeuronSpace
from neft.scoring.scores import Scores
from neft.selection import Lent, WhenFull
from neft.tasks import Task


@dataclass(frozen=True)
class Learnt:
    """An earlier task, as a policy sees it: what its registry entry holds."""

    task: str
    neurons: NeuronSet
    scores: Scores | None = None
    memory: Memory | None = None


@dataclass(frozen=True)
class Candidates:
    """What a new task may choose from, and what it chooses by.

    Attributes:
        free: the neurons that it may choose.
        scores: what they are ranked by.
        when_full: what is done where a site has too few of them, as `neft.selection.select` has it.
        lent: for `share`, the neurons that may be shared.
    """

    free: NeuronSet
    scores: Scores
    when_full: WhenFull = "error"
    lent: Lent | None = None


class ProtectionPolicy(Protocol):
    """Guards the base model and earlier tasks. One small dataclass a file; its fields are its options in a config.

    A policy says at least which neurons are candidates; the rest does nothing unless it is overridden.
    """

    name: ClassVar[str]

    def reserve(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> NeuronSet:
        """The neurons of the untouched base model that the policy treats apart from the others, if any.

        Asked once a run, before anything is learnt or laid on; `model` is left as it was, bit for bit.
        """
        return space.none()

    def before(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace, seed: int
    ) -> Learnt | None:
        """What the untouched base model can do, as if it were a task learnt before the first; None to leave it out.

        Asked once a run, as `reserve`; it stands first among the earlier tasks that the other methods are given.
        """
        return None

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        """What a task with these `scores` may choose from; `reserved` is what `reserve` gave."""
        ...

    def guard(self, model: nn.Module, neurons: NeuronSet, earlier: Sequence[Learnt]) -> Guard | None:
        """What stands beside the training of `neurons`; `model` holds what was learnt so far."""
        return None

    def remember(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        neurons: NeuronSet,
        task: Task,
        max_length: int,
        seed: int,
    ) -> Memory | None:
        """What to keep of a task that has just been learnt; `model` holds it, and is left as it was, bit for bit.

        Args:
            neurons: the neurons that the task has trained.
            max_length: tokens of an example.
            seed: for drawing a sample of the task's training data.
        """
        return None


def without(neurons: NeuronSet, earlier: Sequence[Learnt]) -> NeuronSet:
    """`neurons` less those that earlier tasks own.

    Raises:
        InputError: an earlier task's neurons belong to another space.
    """
    for learnt in earlier:
        neurons = neurons - learnt.neurons
    return neurons


def importance(space: NeuronSpace, earlier: Sequence[Learnt]) -> dict[str, torch.Tensor]:
    """Site name -> importance (site size,) to earlier tasks: the largest score, each task's brought to mean 1 a site.

    A task without recorded scores counts through the neurons that it owns, as if they stood at ten times the mean.

    Raises:
        InputError: an earlier task's neurons belong to another space.
    """
    for learnt in earlier:
        learnt.neurons.check_space(space)
    found = {site.name: torch.zeros(site.size) for site in space.sites}
    for learnt in earlier:
        for site in space.sites:
            if learnt.scores is not None:
                values = normalised(learnt.scores.values[site.name])
            else:
                values = torch.zeros(site.size).index_fill(0, torch.from_numpy(learnt.neurons[site.name].copy()), 10.0)
            found[site.name] = torch.maximum(found[site.name], values)
    return found


def normalised(values: torch.Tensor) -> torch.Tensor:
    """Scores of a site, brought to mean 1; below zero, where a scorer gives that, counts from the lowest up."""
    values = values - values.min().clamp_max(0)
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
