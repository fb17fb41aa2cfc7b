"""The `similarity` scorer: NeFT's own, which neurons move most when the whole model is fine-tuned for a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch
from neft.modes import checkpointed, in_evaluation
from neft.neurons import NeuronSpace
from neft.scoring.per_neuron import summed_over_weights
from neft.scoring.scores import Scores
from neft.scoring.taps import target_count
from neft.strategies import check_count, check_positive


@dataclass(frozen=True)
class Similarity:
    """1 - cos(w_before, w_after) per neuron, after `steps` of full fine-tuning that are then undone.

    NeFT (arXiv 2403.11621, section 3): the lowest cosine similarity marks the neurons to train; higher is better here,
    hence one minus it. Costs full fine-tuning's time and memory for those steps, and a copy of the weights.
    """

    steps: int = 50
    learning_rate: float = 2e-5

    name: ClassVar[str] = "similarity"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self.name, steps=self.steps)
        check_positive(self.name, learning_rate=self.learning_rate)

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        space: NeuronSpace,
        batches: Sequence[Batch],
        seed: int,
    ) -> Scores:
        parameters = dict(model.named_parameters())
        trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        try:
            # In evaluation mode, since dropout is drawn from the global generator, and scores depend on data alone.
            with in_evaluation(model), checkpointed(model):
                self._fine_tune(model, batches)
            distances = _distances(model, space, before)
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(before[name])
                    parameter.requires_grad_(trainable[name])
                    parameter.grad = gradients[name]
        return Scores(space, distances)

    def _fine_tune(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        device = next(model.parameters()).device
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.0)
        for step in range(self.steps):
            batch = batches[step % len(batches)]
            if not target_count(model, batch["labels"]):
                continue  # the mean over no token is not a number
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _distances(model: nn.Module, space: NeuronSpace, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One minus the cosine, in float64: after a few steps it is far below float32's resolution around 1."""

    def now(module: str) -> torch.Tensor:
        return model.get_parameter(f"{module}.weight").detach().double()

    def then(module: str) -> torch.Tensor:
        return before[f"{module}.weight"].double()

    dot = summed_over_weights(model, space, lambda module: now(module) * then(module))
    new = summed_over_weights(model, space, lambda module: now(module).square())
    old = summed_over_weights(model, space, lambda module: then(module).square())
    tiny = torch.finfo(torch.float64).tiny
    return {name: 1 - dot[name] / (new[name] * old[name]).clamp_min(tiny).sqrt() for name in dot}
