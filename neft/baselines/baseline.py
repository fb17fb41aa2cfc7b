"""What a baseline is: another way to learn a task, run on the same stream and measured in the same way."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.guard import Guard
from neft.tasks import Task

#: How a stream is gone through: its tasks one after another, each from the base model, or all of them at once.
Course = Literal["sequential", "single", "joint"]


class Baseline(Protocol):
    """Learns a task in another way than by neurons. One small dataclass a file; its fields are options in a config.

    An instance lives as long as a run, and may keep what it needs from task to task in fields that are no options
    (`init=False`).
    """

    name: ClassVar[str]

    @property
    def course(self) -> Course:
        """How a stream is gone through."""
        return "sequential"

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        """What masked SFT's trainer is to train, made of a plain model, in place.

        What is to stay as it is does not require a gradient: the audit goes by that. `seed` is another for each task.
        """
        ...

    def guard(self, model: nn.Module) -> Guard | None:
        """What stands beside the training of `model`, which `prepare` made."""
        return None

    def finish(self, model: nn.Module) -> nn.Module:
        """The plain model with what was learnt in its weights, from what `prepare` made."""
        ...

    def remember(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, seed: int
    ) -> None:
        """Keep what later tasks need of one that was just learnt; `model` is what `finish` gave."""
