"""The `none` policy: every neuron may be chosen again; what forgetting costs without protection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from neft.neurons import NeuronSet
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy
from neft.scoring.scores import Scores


@dataclass(frozen=True)
class Unprotected(ProtectionPolicy):
    """No protection: the control for the others."""

    name: ClassVar[str] = "none"

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        return Candidates(scores.space.all(), scores)
