"""The `hft` baseline: half of each layer's matrices are trained, drawn anew for each task."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from neft.baselines.baseline import Baseline
from neft.neurons import NeuronSpace


@dataclass(frozen=True)
class HalfFineTuning(Baseline):
    """Half fine-tuning (HFT, arXiv 2404.18466): a random half of each attention and feed-forward block is trained.

    What is drawn is a whole matrix: two of query, key, value and output, and one or two, by turns, of gate, up and
    down. Norms, biases, embeddings and the head stay frozen.
    """

    name: ClassVar[str] = "hft"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        model.requires_grad_(False)
        draw = random.Random(seed)
        rounds_up = draw.random() < 0.5
        for matrices in _blocks(model):
            count = (len(matrices) + rounds_up) // 2
            rounds_up ^= len(matrices) % 2 == 1
            for module in draw.sample(matrices, count):
                model.get_submodule(module).get_parameter("weight").requires_grad_(True)
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)


def _blocks(model: nn.Module) -> list[list[str]]:
    """The modules that hold the matrices of each attention and each feed-forward block, in the order of the model."""
    blocks: dict[tuple[str, bool], list[str]] = {}
    for site in NeuronSpace.from_model(model, ["ffn", "attention", "qk"]).sites:
        block = blocks.setdefault((site.name.removesuffix(site.kind), site.kind == "ffn"), [])
        block += [part.module for part in site.parts if part.module not in block]
    return list(blocks.values())
