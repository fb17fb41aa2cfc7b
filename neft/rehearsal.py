"""Rehearsal: which examples of a learnt task are kept, and how they are mixed into what a later task is trained on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest

from neft.guard import Guard
from neft.tasks import Example, Task

#: As many old examples as new ones in a step: experience replay with a tiny memory (arXiv 1902.10486).
SHARE = 0.5


def kept(task: Task, count: int, seed: int) -> tuple[Example, ...]:
    """`count` of a task's training examples, or all if there are no more, drawn by the seed.

    Those of a classification are balanced over its completions, as far as its data go.
    """
    drawn = random.Random(seed).sample(task.train, len(task.train))
    if not task.completions:
        return tuple(drawn[:count])
    by_completion = [[example for example in drawn if example.completion == text] for text in task.completions]
    turns = chain.from_iterable(zip_longest(*by_completion))
    return tuple(islice((example for example in turns if example is not None), count))


@dataclass(frozen=True)
class Rehearsal(Guard):
    """Mixes in what was kept of earlier tasks (one or more examples of each), so that `share` of all rows are old.

    Each task is rehearsed as often as the others, and each of its examples as often as the rest.
    """

    kept: tuple[tuple[Example, ...], ...]
    share: float = SHARE

    def rehearsed(self, count: int) -> Sequence[Example]:
        wanted = round(count * self.share / (1 - self.share))
        turns = zip(*(cycle(examples) for examples in self.kept), strict=True)
        return tuple(islice(chain.from_iterable(turns), wanted))
