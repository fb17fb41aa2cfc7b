"""The `exclude` policy: a neuron belongs to the first task that chose it, and one that matters to others is avoided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from neft.errors import InputError
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy, importance, normalised, without
from neft.scoring.scores import Scores
from neft.selection import Lent, WhenFull
from neft.strategies import check_positive


@dataclass(frozen=True)
class Exclude(ProtectionPolicy):
    """Neurons that earlier tasks own, or that stand in the `top` share of their scores, cannot be chosen.

    Hard isolation, as PackNet's (arXiv 1711.05769). Among the others a neuron is ranked by its score for the new task
    over its importance to earlier ones: s / (max over earlier tasks of their scores, each with mean 1 a site, +
    `smoothing`); without `relative`, by its score alone. Where a site has too few neurons left, `when_full` answers:
    `error` stops, `share` takes those of earlier tasks that matter least, `spill` goes to other sites.
    """

    top: float = 0.0
    relative: bool = True
    smoothing: float = 0.05
    when_full: WhenFull = "error"

    name: ClassVar[str] = "exclude"

    def __post_init__(self) -> None:
        check_positive(self.name, smoothing=self.smoothing)
        if not isinstance(self.top, int | float) or isinstance(self.top, bool) or not 0 <= self.top < 1:
            raise InputError(f"option 'top' of {self.name!r} is {self.top!r}; it must be a number from 0 to below 1")
        if not isinstance(self.relative, bool):
            raise InputError(f"option 'relative' of {self.name!r} is {self.relative!r}; it must be true or false")
        if self.when_full not in get_args(WhenFull):
            raise InputError(
                f"option 'when_full' of {self.name!r} is {self.when_full!r}; it must be error, share or spill"
            )

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        space = scores.space
        kept = importance(space, earlier)
        owned = space.all() - without(space.all(), earlier)
        if self.top:
            owned = owned | _highest(space, earlier, self.top)
        ranked = scores
        if self.relative and earlier:
            ranked = Scores(
                space,
                {name: normalised(values) / (kept[name] + self.smoothing) for name, values in scores.values.items()},
            )
        lent = Lent(owned, kept) if self.when_full == "share" else None
        return Candidates(space.all() - owned, ranked, self.when_full, lent)


def _highest(space: NeuronSpace, earlier: Sequence[Learnt], share: float) -> NeuronSet:
    """The neurons that stand in the top `share` of an earlier task's scores, site by site."""
    found = space.none()
    for learnt in earlier:
        if learnt.scores is not None:
            chosen = {
                name: torch.topk(values, round(share * len(values))).indices
                for name, values in learnt.scores.values.items()
            }
            found = found | NeuronSet(space, chosen)
    return found
