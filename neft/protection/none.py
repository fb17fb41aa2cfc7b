"""The `none` policy: every neuron may be chosen again; what forgetting costs without protection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.policy import Learnt


@dataclass(frozen=True)
class Unprotected:
    """No protection: the control for the others."""

    name: ClassVar[str] = "none"

    def free(self, space: NeuronSpace, earlier: Sequence[Learnt]) -> NeuronSet:
        return space.all()
