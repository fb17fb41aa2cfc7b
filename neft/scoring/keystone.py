"""The `keystone` scorer: neurons that fire for every capability of the model, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch
from neft.keystone import Keystones, KeystoneSearch
from neft.neurons import NeuronSpace
from neft.scoring.scores import Scores


@dataclass(frozen=True)
class Keystone(KeystoneSearch):
    """How many capabilities count the neuron among the top `rho` of its site, then its cross-task strength.

    Keystone neurons (arXiv 2605.24846): mean |activation| over tokens generated from a few prompts of each capability.
    The intersection of all capabilities comes first, then what all but one share, so that any budget can be filled.
    """

    name: ClassVar[str] = "keystone"
    needs_data: ClassVar[bool] = False

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        space: NeuronSpace,
        batches: Sequence[Batch],
        seed: int,
    ) -> Scores:
        found = self.find(model, tokenizer, space)
        return Scores(space, {site.name: _site_scores(found, site.name) for site in space.sites})


def _site_scores(found: Keystones, site: str) -> torch.Tensor:
    """Capabilities plus strength scaled into [0, 1): x / (1 + x) of log(1 + strength), float64 (site size,).

    The logarithm keeps float32 scores of very strong neurons apart, and below the next whole number.
    """
    strength = found.strength[site].log1p()
    return found.capabilities_of(site) + strength / (1 + strength)
