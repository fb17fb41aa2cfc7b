"""The `replay` baseline: sequential fine-tuning of every weight, some examples of earlier tasks mixed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.baselines.full import Full
from neft.guard import Guard
from neft.rehearsal import SHARE, Rehearsal, kept
from neft.strategies import check_count, check_fraction
from neft.tasks import Example, Task


@dataclass(frozen=True)
class Replay(Full):
    """Experience replay with a small memory (arXiv 1902.10486): `examples` of each earlier task are kept.

    They are mixed in so that `share` of all that is trained on is rehearsed. The only baseline but `lora` with `replay`
    that stores data.
    """

    examples: int = 50
    share: float = SHARE
    _kept: list[tuple[Example, ...]] = field(init=False, default_factory=list, repr=False, compare=False)

    name: ClassVar[str] = "replay"

    def __post_init__(self) -> None:
        check_count(self.name, examples=self.examples)
        check_fraction(self.name, share=self.share)

    def guard(self, model: nn.Module) -> Guard | None:
        return Rehearsal(tuple(self._kept), self.share) if self._kept else None

    def remember(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int, seed: int
    ) -> None:
        self._kept.append(kept(task, self.examples, seed))
