"""The `joint` baseline: all tasks at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neft.baselines.baseline import Course
from neft.baselines.delegate import Delegate


@dataclass(frozen=True)
class Joint(Delegate):
    """The data of all tasks are one training, by the baseline `by`: multitask learning, what a stream can reach."""

    name: ClassVar[str] = "joint"

    @property
    def course(self) -> Course:
        return "joint"
