"""Scores: a number per neuron, higher for the neurons that a task should train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch
from neft.errors import FailedError, InputError
from neft.files import PathLike, load_tensors, save_tensors, understood
from neft.neurons import NeuronSpace

_FILE_KIND = "neft-scores"


@dataclass(frozen=True)
class Scores:
    """Site name -> float32 scores (site size,), on the CPU, for every site of a neuron space."""

    space: NeuronSpace
    values: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: a site is missing or has another size.
            FailedError: a score is not finite.
        """
        checked = {}
        for site in self.space.sites:
            values = self.values.get(site.name)
            if values is None or tuple(values.shape) != (site.size,):
                given = "none" if values is None else f"shape {tuple(values.shape)}"
                raise InputError(f"scores for site {site.name!r} must have shape ({site.size},), not {given}")
            values = values.detach().to("cpu", torch.float32)
            if not torch.isfinite(values).all():
                raise FailedError(
                    f"scores of site {site.name!r} are not finite: the model's loss or activations overflow on these "
                    "batches; look for broken rows, or use a wider model.dtype"
                )
            checked[site.name] = values
        object.__setattr__(self, "values", MappingProxyType(checked))

    def save(self, path: PathLike) -> None:
        """Write the scores and their space to one safetensors file, in 2 bytes each.

        They are float16, as shares of the largest magnitude of their site: to 3 digits, and 0 below a 1.6e7th of it.
        """
        largest = {name: float(values.abs().max()) or 1.0 for name, values in self.values.items()}
        shares = {name: (values.double() / largest[name]).half() for name, values in self.values.items()}
        save_tensors(path, _FILE_KIND, shares, {"space": self.space.to_dict(), "largest": largest})

    @classmethod
    def load(cls, path: PathLike) -> Scores:
        """
        Raises:
            InputError: no such file, or not a file of scores.
            FailedError: the file is corrupt.
        """
        shares, description = load_tensors(path, _FILE_KIND)
        with understood(path):
            # A file of before 0.2 holds the scores as they are.
            largest = description.get("largest", {})
            values = {name: (share.double() * largest.get(name, 1.0)).float() for name, share in shares.items()}
            return cls(NeuronSpace.from_dict(description["space"]), values)


class Scorer(Protocol):
    """Gives each neuron a score for a task. One small dataclass a file; its fields are its options in a config."""

    name: ClassVar[str]
    #: Whether `batches` is read at all.
    needs_data: ClassVar[bool]

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        space: NeuronSpace,
        batches: Sequence[Batch],
        seed: int,
    ) -> Scores:
        """Score every neuron of `space`; `model` is left as it was, bit for bit.

        Args:
            model: a transformers model that returns a loss when given labels.
            tokenizer: the model's own, for scorers that read text of their own.
            batches: `input_ids`, `attention_mask` and `labels` (batch, tokens); padding and prompt are labelled -100.
            seed: for scorers that draw at random.
        """
        ...
