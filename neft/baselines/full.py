"""The `full` baseline: plain sequential fine-tuning of every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from neft.baselines.baseline import Baseline


@dataclass(frozen=True)
class Full(Baseline):
    """All weights are trained on each task in turn (SeqFT in the literature)."""

    name: ClassVar[str] = "full"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return model.requires_grad_(True)

    def finish(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)
