"""The `activation` scorer: how strongly each neuron fires on the task's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch
from neft.neurons import NeuronSpace, Site
from neft.scoring.scores import Scores
from neft.scoring.taps import run_tapped


@dataclass(frozen=True)
class Activation:
    """Mean over real tokens of |a|; forward passes only (as keystone neurons are found, arXiv 2605.24846)."""

    name: ClassVar[str] = "activation"
    needs_data: ClassVar[bool] = True

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        space: NeuronSpace,
        batches: Sequence[Batch],
        seed: int,
    ) -> Scores:
        totals = {site.name: torch.zeros(site.size) for site in space.sites}
        counts = dict.fromkeys(totals, 0)

        def collect(site: Site, activation: torch.Tensor, gradient: torch.Tensor | None, mask: torch.Tensor) -> None:
            strength = activation.float().abs().mean(-1) * mask[..., None]
            totals[site.name] += strength.sum((0, 1)).cpu()
            counts[site.name] += int(mask.sum())

        run_tapped(model, space, batches, collect, backward=False)
        return Scores(space, {name: total / max(counts[name], 1) for name, total in totals.items()})
