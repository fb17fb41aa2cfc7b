"""The `lora` baseline: sequential LoRA, each task's adapter merged before the next task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.baselines.baseline import Baseline
from neft.guard import Guard
from neft.rehearsal import Rehearsal, kept
from neft.strategies import check_count, check_positive
from neft.tasks import Example, Task


@dataclass(frozen=True)
class Lora(Baseline):
    """PEFT's LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer but the head.

    With `replay`, so many examples of each earlier task are rehearsed, as by `replay`.
    """

    r: int = 8
    alpha: int = 16
    replay: int = 0
    _kept: list[tuple[Example, ...]] = field(init=False, default_factory=list, repr=False, compare=False)

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        check_count(self.name, r=self.r)
        check_positive(self.name, alpha=self.alpha)
        if self.replay != 0:
            check_count(self.name, replay=self.replay)

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return with_lora(model, self.r, self.alpha, seed)

    def guard(self, model: nn.Module) -> Guard | None:
        return Rehearsal(tuple(self._kept)) if self._kept else None

    def finish(self, model: nn.Module) -> nn.Module:
        return merged(model)

    def remember(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, seed: int
    ) -> None:
        if self.replay:
            self._kept.append(kept(task, self.replay, seed))


def with_lora(model: nn.Module, r: int, alpha: int, seed: int) -> PeftModel:
    """The model with PEFT's LoRA on every linear layer but the head, drawn by the seed."""
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def merged(model: nn.Module) -> nn.Module:
    """The plain model with its adapter's change added to its weights."""
    plain: nn.Module = cast(PeftModel, model).merge_and_unload()
    return plain
