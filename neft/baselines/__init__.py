"""Baselines, one a file, found by name in a config."""

from neft.baselines.baseline import Baseline
from neft.baselines.full import Full
from neft.baselines.lora import Lora

BASELINES: dict[str, type[Baseline]] = {baseline.name: baseline for baseline in (Full, Lora)}

__all__ = ["BASELINES", "Baseline"]
