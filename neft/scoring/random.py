"""The `random` scorer: the control that every other scorer has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch
from neft.neurons import NeuronSpace
from neft.scoring.scores import Scores


@dataclass(frozen=True)
class Random:
    """Uniform in [0, 1), from the seed alone (as HFT freezes a random half, arXiv 2404.18466)."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        space: NeuronSpace,
        batches: Sequence[Batch],
        seed: int,
    ) -> Scores:
        generator = torch.Generator().manual_seed(seed)
        return Scores(space, {site.name: torch.rand(site.size, generator=generator) for site in space.sites})
