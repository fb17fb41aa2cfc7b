"""What a baseline is: another way to learn a task, run on the same stream and measured in the same way."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import nn


class Baseline(Protocol):
    """Learns a task in another way than by neurons. One small dataclass a file; its fields are options in a config."""

    name: ClassVar[str]

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """What masked SFT's trainer is to train, made of a plain model, in place."""
        ...

    def finish(self, model: nn.Module) -> nn.Module:
        """The plain model with what was learnt in its weights, from what `prepare` made."""
        ...
