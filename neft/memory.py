"""Memory: what a protection policy keeps of a learnt task, so that later tasks can be learnt without its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from neft.files import PathLike, load_tensors, save_tensors, understood

_FILE_KIND = "neft-memory"


@dataclass(frozen=True)
class Memory:
    """Named tensors and a JSON description, as the policy called `policy` wrote them and alone can read them."""

    policy: str
    tensors: Mapping[str, torch.Tensor]
    description: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def save(self, path: PathLike) -> None:
        """Write the memory to one safetensors file."""
        save_tensors(path, _FILE_KIND, self.tensors, {"policy": self.policy, "description": dict(self.description)})

    @classmethod
    def load(cls, path: PathLike) -> Memory:
        """
        Raises:
            InputError: no such file, or not a memory.
            FailedError: the file is corrupt.
        """
        tensors, described = load_tensors(path, _FILE_KIND)
        with understood(path):
            return cls(described["policy"], tensors, described["description"])
