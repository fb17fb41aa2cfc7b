"""Baselines, one a file, found by name in a config."""

from neft.baselines.baseline import Baseline, Course
from neft.baselines.ewc import Ewc
from neft.baselines.ffn import FeedForward
from neft.baselines.full import Full
from neft.baselines.hft import HalfFineTuning
from neft.baselines.joint import Joint
from neft.baselines.lora import Lora
from neft.baselines.olora import OrthogonalLora
from neft.baselines.osf import OrthogonalSubspace
from neft.baselines.replay import Replay
from neft.baselines.single import Single

BASELINES: dict[str, type[Baseline]] = {
    baseline.name: baseline
    for baseline in (
        Full,
        FeedForward,
        HalfFineTuning,
        Ewc,
        Replay,
        Lora,
        OrthogonalLora,
        OrthogonalSubspace,
        Single,
        Joint,
    )
}

__all__ = ["BASELINES", "Baseline", "Course"]
