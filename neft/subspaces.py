"""Subspaces: the directions in which modules' inputs lie, gathered from a running model, kept small, and united."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from neft.encoding import Batch
from neft.modes import in_evaluation
from neft.scoring.taps import run_body


@dataclass(frozen=True)
class Moments:
    """Uncentred second moments of what modules read, over all real tokens of some batches.

    Attributes:
        groups: module name -> the first module that reads the very same input (gate and up read one).
        second: that module's name -> mean of x x^T, float32 (in, in).
        energy: the name of a module asked for its channels -> mean of x^2, float32 (in,).
    """

    groups: Mapping[str, str]
    second: Mapping[str, torch.Tensor]
    energy: Mapping[str, torch.Tensor]


def gather(model: nn.Module, matrices: Iterable[str], channels: Iterable[str], batches: Sequence[Batch]) -> Moments:
    """Run `model` over `batches`, in evaluation mode, and add up what modules read; the model is left as it was.

    Args:
        matrices: modules whose inputs' second moments are wanted; (in, in) floats are held for each group of them.
        channels: modules of whose inputs the mean energy of each channel is enough.
    """
    device = next(model.parameters()).device
    second: dict[str, torch.Tensor] = {}
    energy: dict[str, torch.Tensor] = {}
    groups: dict[str, str] = {}
    seen: list[tuple[torch.Tensor, str]] = []
    tokens = 0

    def add(name: str, wanted: bool, inputs: tuple[torch.Tensor, ...]) -> None:
        found = inputs[0]
        if wanted and (first := next((owner for tensor, owner in seen if tensor is found), None)) is not None:
            groups[name] = first
            return
        read = found.detach().float().reshape(*mask.shape, -1)[mask]
        if wanted:
            seen.append((found, name))
            groups[name] = name
            second[name] = second.get(name, 0) + read.T @ read
        else:
            energy[name] = energy.get(name, 0) + read.square().sum(0)

    with ExitStack() as stack:
        stack.enter_context(in_evaluation(model))
        for wanted, names in ((True, matrices), (False, channels)):
            for name in names:
                handle = model.get_submodule(name).register_forward_pre_hook(
                    lambda _, inputs, name=name, wanted=wanted: add(name, wanted, inputs)
                )
                stack.callback(handle.remove)
        for batch in batches:
            placed = {key: tensor.to(device) for key, tensor in batch.items()}
            mask = placed["attention_mask"].bool()
            tokens += int(mask.sum())
            run_body(model, placed)
            seen.clear()
    return Moments(
        groups,
        {name: total / tokens for name, total in second.items()},
        {name: total / tokens for name, total in energy.items()},
    )


@dataclass(frozen=True)
class Directions:
    """The leading directions of an input: orthonormal rows `basis` (r, d), and the energy (r,) that each carries.

    `total` is the energy of all directions, kept or not.
    """

    basis: torch.Tensor
    energy: torch.Tensor
    total: float

    @property
    def share(self) -> float:
        """How much of the input's energy lies in these directions, in [0, 1]."""
        return float(self.energy.sum()) / self.total if self.total else 1.0


def leading(second: torch.Tensor, share: float, most: int, total: float | None = None) -> Directions:
    """As few leading directions of second moments (d, d) as carry `share` of their energy; at most `most`.

    Args:
        total: the energy that the share is one of; default: all of `second`'s.
    """
    values, vectors = torch.linalg.eigh(second.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = float(values.sum()) if total is None else total
    # The last direction must reach the share, rounding aside; a direction without energy is never kept.
    short = values.cumsum(0) < share * total * (1 - 1e-6)
    count = min(int(short.sum()) + 1, most, int((values > 1e-12 * total).sum()))
    return Directions(vectors[:, :count].T.contiguous(), values[:count], total)


def united(parts: Sequence[Directions], share: float, most: int) -> Directions:
    """The leading directions of several inputs together, each counting the same, kept or not."""
    second = torch.stack(
        [(each.basis.double().T * (each.energy.double() / each.total)) @ each.basis.double() for each in parts]
    ).sum(0)
    return leading(second, share, most, total=float(len(parts)))
