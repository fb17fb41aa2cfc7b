"""The `olora` baseline: a LoRA for each task, kept orthogonal to those of earlier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from neft.baselines.baseline import Baseline
from neft.baselines.lora import merged, with_lora
from neft.guard import Guard
from neft.strategies import check_count, check_positive


@dataclass(frozen=True)
class OrthogonalLora(Baseline):
    """O-LoRA (arXiv 2310.14152): `weight` * sum of abs(A_old A_new^T), as in its authors' code, is added to the loss.

    A_old (rows of all earlier tasks, in) and A_new (r, in) are the matrices of each linear layer; `weight` is the
    paper's lambda_1, and its default the authors'. Each LoRA is merged after its task, which computes the same as
    keeping it frozen.
    """

    r: int = 8
    alpha: int = 16
    weight: float = 0.5
    _earlier: dict[str, torch.Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    name: ClassVar[str] = "olora"

    def __post_init__(self) -> None:
        check_count(self.name, r=self.r)
        check_positive(self.name, alpha=self.alpha, weight=self.weight)

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return with_lora(model, self.r, self.alpha, seed)

    def guard(self, model: nn.Module) -> Guard | None:
        if not self._earlier:
            return None
        return _Orthogonal([(self._earlier[name], new) for name, new in _matrices(model).items()], self.weight)

    def finish(self, model: nn.Module) -> nn.Module:
        for name, new in _matrices(model).items():
            found = new.detach().clone()
            self._earlier[name] = torch.cat([self._earlier[name], found]) if name in self._earlier else found
        return merged(model)


@dataclass(frozen=True)
class _Orthogonal(Guard):
    """Penalises what A has in common with earlier tasks': pairs of A_old and A_new, a pair a linear layer."""

    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    weight: float

    def penalty(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return self.weight * torch.stack([(old @ new.T).abs().sum() for old, new in self.pairs]).sum()


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> A (r, in) of each linear layer's LoRA."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_A." in name}
