"""What a protection policy is: it says which neurons a new task may choose, given what earlier tasks learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.neurons import NeuronSet, NeuronSpace


@dataclass(frozen=True)
class Learnt:
    """An earlier task, as a policy sees it."""

    task: str
    neurons: NeuronSet


class ProtectionPolicy(Protocol):
    """Guards the base model and earlier tasks. One small dataclass a file; its fields are its options in a config."""

    name: ClassVar[str]

    def reserve(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> NeuronSet:
        """The neurons of the untouched base model that the policy treats apart from the others, if any.

        Asked once a run, before anything is learnt or laid on; `model` is left as it was, bit for bit.
        """
        ...

    def free(self, space: NeuronSpace, earlier: Sequence[Learnt], reserved: NeuronSet) -> NeuronSet:
        """The neurons that a new task may choose from; `reserved` is what `reserve` gave."""
        ...


def without(neurons: NeuronSet, earlier: Sequence[Learnt]) -> NeuronSet:
    """`neurons` less those that earlier tasks own.

    Raises:
        InputError: an earlier task's neurons belong to another space.
    """
    for learnt in earlier:
        neurons = neurons - learnt.neurons
    return neurons
