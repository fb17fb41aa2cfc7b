"""The `distill` policy: while a task is learnt, the model goes on predicting its prompts as it did before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from neft.encoding import IGNORED
from neft.guard import Guard
from neft.modes import in_evaluation
from neft.neurons import NeuronSet
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy
from neft.scoring.scores import Scores
from neft.strategies import check_count, check_positive


@dataclass(frozen=True)
class Distill(ProtectionPolicy):
    """Adds `weight` times the divergence of the model's next-token distribution from what it was before the task.

    Learning without forgetting (Li & Hoiem 2017, arXiv 1606.09282), in the form that fits language models: KL(before ||
    now), at `temperature`, where prompts go on, not where the completion is predicted, which is to change. It is taken
    at `positions` places of each batch, drawn anew for every one. Nothing is stored: the model before the task is the
    same one with the task's rows left out. It takes two more forward passes and one more backward pass a step.
    """

    weight: float = 1.0
    temperature: float = 2.0
    positions: int = 16

    name: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        check_positive(self.name, weight=self.weight, temperature=self.temperature)
        check_count(self.name, positions=self.positions)

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        return Candidates(scores.space.all(), scores)

    def guard(self, model: nn.Module, neurons: NeuronSet, earlier: Sequence[Learnt]) -> Guard | None:
        return _Distilling(self.weight, self.temperature, self.positions) if earlier else None


@dataclass(frozen=True)
class _Distilling(Guard):
    """Holds a PEFT model to what it predicts with its adapter turned off."""

    weight: float
    temperature: float
    positions: int
    #: Its own, so that what else is drawn in training stays as it is without it.
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def penalty(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        asked = _inside_prompts(inputs)
        places = asked.any(dim=0).nonzero().squeeze(-1)
        if not len(places):
            return None
        drawn = torch.randperm(len(places), generator=self.generator)[: self.positions].sort().values
        places = places[drawn.to(places.device)]
        read = {name: value for name, value in inputs.items() if name != "labels"}

        def predicted() -> torch.Tensor:
            logits: torch.Tensor = model(**read, use_cache=False, logits_to_keep=places).logits
            return F.log_softmax(logits[asked[:, places]].float() / self.temperature, dim=-1)

        # The adapter is turned off before the rows that are to learn are laid on, not between them and their gradient.
        with torch.no_grad(), in_evaluation(model), cast(PeftModel, model).disable_adapter():
            before = predicted()
        divergence = F.kl_div(predicted(), before, log_target=True, reduction="batchmean")
        # The gradient of softened distributions falls with the square of the temperature (Hinton et al. 2015).
        return self.weight * self.temperature**2 * divergence


def _inside_prompts(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(batch, tokens): where the next token is one of the prompt's, neither of a completion nor padding."""
    labels = inputs["labels"]
    real = inputs.get("attention_mask", torch.ones_like(labels)).bool()
    inside = torch.zeros_like(real)
    inside[:, :-1] = real[:, :-1] & real[:, 1:] & (labels[:, 1:] == IGNORED)
    return inside
