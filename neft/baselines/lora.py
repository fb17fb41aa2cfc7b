"""The `lora` baseline: sequential LoRA, each task's adapter merged before the next task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from neft.baselines.baseline import Baseline
from neft.strategies import check_count, check_positive


@dataclass(frozen=True)
class Lora(Baseline):
    """PEFT's LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer but the head."""

    r: int = 8
    alpha: int = 16

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        check_count(self.name, r=self.r)
        check_positive(self.name, alpha=self.alpha)

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        config = LoraConfig(r=self.r, lora_alpha=self.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    def finish(self, model: nn.Module) -> nn.Module:
        merged: nn.Module = cast(PeftModel, model).merge_and_unload()
        return merged
