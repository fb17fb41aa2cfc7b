"""Guard: what stands beside a training run so that what earlier tasks need is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from neft.tasks import Example

#: What may stay of a change (k, d) in a module's trained rows; linear, and of the same shape and dtype.
Limit = Callable[[torch.Tensor], torch.Tensor]


class Guard(Protocol):
    """Limits, rehearses or penalises. A guard overrides what it needs; the rest does nothing."""

    def limits(self) -> Mapping[str, Limit]:
        """Module name -> limit of the changes in its trained rows.

        The trainer applies it to the rows' gradient and to what each optimiser step makes of them: an adaptive step
        along a limited gradient does not stay within the limit by itself.
        """
        return {}

    def rehearsed(self, count: int) -> Sequence[Example]:
        """Examples of earlier tasks to be trained on among `count` new ones."""
        return ()

    def penalty(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """What is added to a batch's mean loss, a scalar; None for nothing."""
        return None
