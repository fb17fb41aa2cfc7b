"""The `ewc` baseline: full fine-tuning, held back where the weights matter to earlier tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.baselines.full import Full
from neft.encoding import Batch, batches
from neft.guard import Guard
from neft.losses import completion_loss
from neft.modes import in_evaluation
from neft.strategies import check_count, check_positive
from neft.tasks import Task


@dataclass(frozen=True)
class Ewc(Full):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): `weight`/2 * sum F (w - w*)^2.

    w* are the weights after the newest task, and F the sum of the tasks' Fisher diagonals, each estimated on
    `examples` of its training data: online EWC (Schwarz et al. 2018, arXiv 1805.06370, with gamma 1), whose memory does
    not grow with tasks.
    """

    weight: float = 1000.0
    examples: int = 64
    _fisher: dict[str, torch.Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    _anchor: dict[str, torch.Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    name: ClassVar[str] = "ewc"

    def __post_init__(self) -> None:
        check_positive(self.name, weight=self.weight)
        check_count(self.name, examples=self.examples)

    def guard(self, model: nn.Module) -> Guard | None:
        if not self._fisher:
            return None
        held = [(weight, self._anchor[name], self._fisher[name]) for name, weight in model.named_parameters()]
        return _Elastic(held, self.weight)

    def remember(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, seed: int
    ) -> None:
        sample = random.Random(seed).sample(task.train, min(self.examples, len(task.train)))
        found = fisher_diagonal(model, list(batches(tokenizer, sample, 1, max_length)))
        for name, weight in model.named_parameters():
            self._fisher[name] = found[name] + self._fisher[name] if name in self._fisher else found[name]
            self._anchor[name] = weight.detach().clone()


@dataclass(frozen=True)
class _Elastic(Guard):
    """Pulls each weight back to its anchor, by its Fisher information: triples of the three, of one shape each."""

    held: Sequence[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]
    weight: float

    def penalty(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        pulls = [(fisher * (weight.float() - anchor).square()).sum() for weight, anchor, fisher in self.held]
        return self.weight / 2 * torch.stack(pulls).sum()


def fisher_diagonal(model: nn.Module, examples: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Name -> mean over examples of the squared gradient of a completion's log-likelihood, fp32: the empirical Fisher.

    Args:
        model: a plain model, which is left as it was.
        examples: batches of one example each, since squares of sums are no sums of squares.
    """
    weights = dict(model.named_parameters())
    before = {name: weight.requires_grad for name, weight in weights.items()}
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    model.requires_grad_(True)
    try:
        with in_evaluation(model):
            for example in examples:
                inputs = {name: tensor.to(next(model.parameters()).device) for name, tensor in example.items()}
                loss, _ = completion_loss(model, inputs)
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        totals[name] += gradient.float().square()
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    return {name: total / len(examples) for name, total in totals.items()}
