"""The `exclude` policy: a neuron belongs to the first task that chose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.policy import Learnt, without


@dataclass(frozen=True)
class Exclude:
    """Neurons that earlier tasks own cannot be chosen (hard isolation, as PackNet's, arXiv 1711.05769)."""

    name: ClassVar[str] = "exclude"

    def reserve(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> NeuronSet:
        return space.none()

    def free(self, space: NeuronSpace, earlier: Sequence[Learnt], reserved: NeuronSet) -> NeuronSet:
        return without(space.all(), earlier)
