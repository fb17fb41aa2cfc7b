"""The `soft` policy: every neuron may be chosen, and moves the less the more it matters to earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from neft.guard import Guard, Limit
from neft.neurons import NeuronSet
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy, importance
from neft.scoring.scores import Scores


@dataclass(frozen=True)
class Soft(ProtectionPolicy):
    """What a neuron's rows change by is scaled by 1 - its importance to earlier tasks.

    Soft-masking, as SPG's (Konishi et al. 2023, arXiv 2306.14775): importance is the tanh of a neuron's score, brought
    to mean 1 a site, and the largest over earlier tasks. SPG masks parameters and their gradients; here a neuron's rows
    share its importance, and the step itself is scaled, since an adaptive optimiser undoes the scale of a gradient.
    """

    name: ClassVar[str] = "soft"

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        return Candidates(scores.space.all(), scores)

    def guard(self, model: nn.Module, neurons: NeuronSet, earlier: Sequence[Learnt]) -> Guard | None:
        if not earlier:
            return None
        kept = importance(neurons.space, earlier)
        return _Scaled(neurons.per_row({name: 1 - torch.tanh(values) for name, values in kept.items()}))


@dataclass(frozen=True)
class _Scaled(Guard):
    """Scales the change of each trained row by a factor in [0, 1]: module name -> (k,)."""

    factors: Mapping[str, torch.Tensor]

    def limits(self) -> Mapping[str, Limit]:
        return {module: partial(_scaled, factors[:, None]) for module, factors in self.factors.items()}


def _scaled(factors: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    return change * factors.to(change)
