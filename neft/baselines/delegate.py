"""What `single` and `joint` share: another baseline does the learning."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from neft.baselines.baseline import Baseline
from neft.baselines.ffn import FeedForward
from neft.baselines.full import Full
from neft.baselines.hft import HalfFineTuning
from neft.baselines.lora import Lora
from neft.baselines.osf import OrthogonalSubspace
from neft.strategies import Choice, build

#: Those that know nothing of earlier tasks, of which there are none here.
_LEARNERS: dict[str, type[Baseline]] = {
    learner.name: learner for learner in (Full, FeedForward, HalfFineTuning, Lora, OrthogonalSubspace)
}


@dataclass(frozen=True)
class Delegate(Baseline):
    """Learns by the baseline `by`, which remembers nothing."""

    by: Choice = "full"
    _by: Baseline = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by", build(f"baseline for {self.name!r} to learn by", _LEARNERS, self.by))

    def prepare(self, model: nn.Module, seed: int) -> nn.Module:
        return self._by.prepare(model, seed)

    def finish(self, model: nn.Module) -> nn.Module:
        return self._by.finish(model)
