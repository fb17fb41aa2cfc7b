"""What a protection policy is: it says which neurons a new task may choose, given what earlier tasks learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from neft.neurons import NeuronSet, NeuronSpace


@dataclass(frozen=True)
class Learnt:
    """An earlier task, as a policy sees it."""

    task: str
    neurons: NeuronSet


class ProtectionPolicy(Protocol):
    """Guards earlier tasks. One small dataclass a file; its fields are its options in a config."""

    name: ClassVar[str]

    def free(self, space: NeuronSpace, earlier: Sequence[Learnt]) -> NeuronSet:
        """The neurons that a new task may choose from."""
        ...
