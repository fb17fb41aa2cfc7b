"""The `fisher` scorer: the empirical Fisher information of a gate on each neuron."""

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
class Fisher:
    """Mean over examples of (sum over tokens of a * dL/da)^2: E[g^2] for a factor m = 1 on the activation a.

    Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787, eq. 9).
    """

    name: ClassVar[str] = "fisher"
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
            effect = (activation.float() * gradient.float()).sum(-1) * mask[..., None]
            totals[site.name] += effect.sum(1).square().sum(0).cpu()
            # A row of padding alone is no example.
            counts[site.name] += int(mask.any(1).sum())

        run_tapped(model, space, batches, collect, backward=True)
        return Scores(space, {name: total / max(counts[name], 1) for name, total in totals.items()})
