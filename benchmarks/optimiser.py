"""AdamW, fused, with its states in float32 whatever the weights' dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class AdamW:
    """PyTorch's fused AdamW; a weight of another dtype than float32 is stepped as a float32 copy, one at a time.

    PyTorch keeps the states in the weights' dtype, which for bf16 weights loses small updates; those who train so keep
    float32 states, and pay for them in memory.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float = 1e-6):
        self.lr = lr
        self.parameters = list(parameters)
        wide = [each for each in parameters if each.dtype == torch.float32]
        self._narrow = [each for each in parameters if each.dtype != torch.float32]
        self._wide = torch.optim.AdamW(wide, lr=lr, fused=True) if wide else None
        self._states: dict[nn.Parameter, dict[str, Any]] = {}

    def step(self) -> None:
        """One step with the gradients that the parameters hold."""
        if self._wide is not None:
            self._wide.step()
        for parameter in self._narrow:
            copy = nn.Parameter(parameter.detach().float())
            copy.grad = parameter.grad.float()
            optimiser = torch.optim.AdamW([copy], lr=self.lr, fused=True)
            if parameter in self._states:
                optimiser.state[copy] = self._states[parameter]
            optimiser.step()
            self._states[parameter] = optimiser.state[copy]
            with torch.no_grad():
                parameter.copy_(copy)

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the states, after a step."""
        states = [*(self._wide.state.values() if self._wide else ()), *self._states.values()]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
