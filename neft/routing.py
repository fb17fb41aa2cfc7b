"""Routing: a small signature of each task's inputs, and the router that finds the task of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from neft.files import PathLike, load_tensors, save_tensors

_FILE_KIND = "neft-signature"


@dataclass(frozen=True)
class Signature:
    """What a task's inputs look like to the base model: named tensors."""

    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def save(self, path: PathLike) -> None:
        """Write the signature to one safetensors file."""
        save_tensors(path, _FILE_KIND, self.tensors, {})

    @classmethod
    def load(cls, path: PathLike) -> Signature:
        """
        Raises:
            InputError: no such file, or not a signature.
            FailedError: the file is corrupt.
        """
        tensors, _ = load_tensors(path, _FILE_KIND)
        return cls(tensors)
