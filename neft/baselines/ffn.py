"""The `ffn` baseline: plain sequential fine-tuning of the feed-forward weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from neft.baselines.baseline import Baseline
from neft.neurons import NeuronSpace


@dataclass(frozen=True)
class FeedForward(Baseline):
    """All feed-forward weights are trained on each task in turn: every neuron of kind `ffn`, whoever learnt it."""

    name: ClassVar[str] = "ffn"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        model.requires_grad_(False)
        for site in NeuronSpace.from_model(model, ["ffn"]).sites:
            for part in site.parts:
                model.get_submodule(part.module).get_parameter("weight").requires_grad_(True)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)
