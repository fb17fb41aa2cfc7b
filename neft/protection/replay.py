"""The `replay` policy: some examples of each task are kept, and rehearsed while later ones are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.errors import InputError
from neft.guard import Guard
from neft.memory import Memory
from neft.neurons import NeuronSet
from neft.protection.exclude import Exclude
from neft.protection.none import Unprotected
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy
from neft.rehearsal import Rehearsal, kept
from neft.scoring.scores import Scores
from neft.strategies import check_count, check_fraction
from neft.tasks import Example, Task


@dataclass(frozen=True)
class Replay(ProtectionPolicy):
    """Keeps `examples` training examples of each task; of what a later task trains on, `share` are those.

    Experience replay (Robins 1995; for language models, e.g. arXiv 1906.01076), balanced over completions. Any neuron
    may be chosen, or, with `exclude`, those that `exclude` leaves. The examples are kept in the registry as they are:
    not for data that must not be stored.
    """

    examples: int = 64
    share: float = 0.3
    exclude: bool = False

    name: ClassVar[str] = "replay"

    def __post_init__(self) -> None:
        check_count(self.name, examples=self.examples)
        check_fraction(self.name, share=self.share)
        if not isinstance(self.exclude, bool):
            raise InputError(f"option 'exclude' of {self.name!r} is {self.exclude!r}; it must be true or false")

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        policy = Exclude() if self.exclude else Unprotected()
        return policy.candidates(scores, earlier, reserved)

    def guard(self, model: nn.Module, neurons: NeuronSet, earlier: Sequence[Learnt]) -> Guard | None:
        memories = [learnt.memory for learnt in earlier if learnt.memory and learnt.memory.policy == self.name]
        return Rehearsal(tuple(map(_read, memories)), self.share) if memories else None

    def remember(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        neurons: NeuronSet,
        task: Task,
        max_length: int,
        seed: int,
    ) -> Memory | None:
        examples = [[example.prompt, example.completion] for example in kept(task, self.examples, seed)]
        return Memory(self.name, {}, {"examples": examples})


def _read(memory: Memory) -> tuple[Example, ...]:
    """The examples that a memory keeps; a chat's prompt is a list of messages."""
    return tuple(
        Example(prompt if isinstance(prompt, str) else tuple(prompt), completion)
        for prompt, completion in memory.description["examples"]
    )
