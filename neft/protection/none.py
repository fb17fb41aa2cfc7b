"""The `none` policy: every neuron may be chosen again; what forgetting costs without protection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.policy import Learnt


@dataclass(frozen=True)
class Unprotected:
    """No protection: the control for the others."""

    name: ClassVar[str] = "none"

    def reserve(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> NeuronSet:
        return space.none()

    def free(self, space: NeuronSpace, earlier: Sequence[Learnt], reserved: NeuronSet) -> NeuronSet:
        return space.all()
