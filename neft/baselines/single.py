"""The `single` baseline: a model for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neft.baselines.baseline import Course
from neft.baselines.delegate import Delegate


@dataclass(frozen=True)
class Single(Delegate):
    """Each task is learnt from the base model by the baseline `by`: nothing is forgotten, and nothing shared."""

    name: ClassVar[str] = "single"

    @property
    def course(self) -> Course:
        return "single"
