"""The `exclude` policy: a neuron belongs to the first task that chose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.policy import Learnt


@dataclass(frozen=True)
class Exclude:
    """Neurons that earlier tasks own cannot be chosen (hard isolation, as PackNet's, arXiv 1711.05769)."""

    name: ClassVar[str] = "exclude"

    def free(self, space: NeuronSpace, earlier: Sequence[Learnt]) -> NeuronSet:
        free = space.all()
        for learnt in earlier:
            free = free - learnt.neurons
        return free
