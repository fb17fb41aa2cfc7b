"""The `taylor` scorer: how much the loss would change, to first order, if the neuron fell silent."""

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
class Taylor:
    """Mean over real tokens of |a * dL/da|, a the neuron's activation and L the summed loss.

    Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference" (arXiv 1611.06440,
    eq. 8), used to choose what to train as W-NCFT does (arXiv 2407.06488).
    """

    name: ClassVar[str] = "taylor"
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
            assert gradient is not None
            effect = (activation.float() * gradient.float()).sum(-1).abs() * mask[..., None]
            totals[site.name] += effect.sum((0, 1)).cpu()
            counts[site.name] += int(mask.sum())

        run_tapped(model, space, batches, collect, backward=True)
        return Scores(space, {name: total / max(counts[name], 1) for name, total in totals.items()})
