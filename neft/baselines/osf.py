"""The `osf` baseline: only the weak singular directions of each weight matrix are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import OSFConfig, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import nn

from neft.baselines.baseline import Baseline
from neft.baselines.lora import merged
from neft.errors import InputError
from neft.strategies import check_count, check_fraction


@dataclass(frozen=True)
class OrthogonalSubspace(Baseline):
    """PEFT's OSF (arXiv 2504.07097): each matrix's `effective_rank` strongest singular directions stay as they are.

    `effective_rank` is a count, or a share of the matrix's smaller side. Each task's change is merged, so the next
    task's directions are those of what was learnt so far. PEFT keeps the gradients of the trained factors orthogonal to
    the frozen ones, not the optimiser's steps: what is frozen changes a little under AdamW.
    """

    effective_rank: int | float = 0.5

    name: ClassVar[str] = "osf"

    def __post_init__(self) -> None:
        if isinstance(self.effective_rank, float):
            check_fraction(self.name, effective_rank=self.effective_rank)
        else:
            check_count(self.name, effective_rank=self.effective_rank)

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        config = OSFConfig(effective_rank=self.effective_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        prepared = get_peft_model(model, config)
        if not any(isinstance(module, OSFLayer) for module in prepared.modules()):
            raise InputError(
                "baseline 'osf' trains nn.Linear layers alone, and this model has none (GPT-2's are Conv1D); "
                "take another baseline"
            )
        return prepared

    def finish(self, model: nn.Module) -> nn.Module:
        # Not `unload`, as in PEFT's own example: that throws away what the task learnt.
        return merged(model)
