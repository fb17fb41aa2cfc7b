"""Subspaces: the directions in which modules' inputs lie, gathered from a running model, kept small, and united."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from neft.encoding import IGNORED, Batch
from neft.modes import in_evaluation
from neft.scoring.taps import run_body


@dataclass(frozen=True)
class Inputs:
    """What modules read at some tokens.

    Attributes:
        groups: module name -> the first module that reads the very same input (gate and up read one).
        rows: that module's name -> float32 (tokens, in); a row times its token's weight, so that X^T X are the second
            moments.
    """

    groups: Mapping[str, str]
    rows: Mapping[str, torch.Tensor]


def gather(model: nn.Module, modules: Iterable[str], batches: Sequence[Batch], tokens: int) -> Inputs:
    """Run `model` over `batches`, in evaluation mode, and keep what `modules` read; the model is left as it was.

    Tokens from which a label is predicted are few but decide the answer: together they weigh as much as all others.

    Args:
        tokens: how many are kept at most: every token that predicts a label, as far as there is room, then others at
            even distances.
    """
    device = next(model.parameters()).device
    chosen = _tokens(batches, tokens)
    found: dict[str, list[torch.Tensor]] = {}
    groups: dict[str, str] = {}
    seen: list[tuple[torch.Tensor, str]] = []

    def keep(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        read = inputs[0]
        first = next((owner for tensor, owner in seen if tensor is read), None)
        groups[name] = name if first is None else first
        if first is None:
            seen.append((read, name))
            values = read.detach().reshape(-1, read.shape[-1])[places].float()
            found.setdefault(name, []).append(values * weights[:, None])

    with ExitStack() as stack:
        stack.enter_context(in_evaluation(model))
        for name in modules:
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: keep(name, inputs)
            )
            stack.callback(handle.remove)
        for batch, picked in zip(batches, chosen, strict=True):
            places, weights = (values.to(device) for values in picked)
            run_body(model, {key: tensor.to(device) for key, tensor in batch.items()})
            seen.clear()
    return Inputs(groups, {name: torch.cat(parts).cpu() for name, parts in found.items()})


def _tokens(batches: Sequence[Batch], most: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each batch the places (n,) of the tokens to keep, counted through the batch, and a factor (n,) for each."""
    real = torch.cat([batch["attention_mask"].bool().flatten() for batch in batches])
    labelled = torch.cat([_predicts(batch["labels"]).flatten() for batch in batches]) & real
    predicting, others = labelled.nonzero().squeeze(-1), (real & ~labelled).nonzero().squeeze(-1)
    kinds = [_evenly(predicting, most), _evenly(others, most - min(most, len(predicting)))]
    kinds = [places for places in kinds if len(places)]
    places = torch.cat(kinds)
    factors = torch.cat([torch.full((len(kind),), math.sqrt(1 / len(kinds) / len(kind))) for kind in kinds])
    found, start = [], 0
    for batch in batches:
        size = batch["labels"].numel()
        mine = (places >= start) & (places < start + size)
        found.append((places[mine] - start, factors[mine]))
        start += size
    return found


def _predicts(labels: torch.Tensor) -> torch.Tensor:
    """Where a causal model predicts a label: one token before it."""
    return torch.cat([labels[:, 1:] != IGNORED, torch.zeros_like(labels[:, :1], dtype=torch.bool)], dim=1)


def _evenly(places: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the places, at even distances."""
    if len(places) <= most:
        return places
    return places[torch.arange(most) * len(places) // most] if most else places[:0]


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

    @property
    def rows(self) -> torch.Tensor:
        """Rows (r, d) whose second moments are those of the input along its directions, of total energy 1."""
        return self.basis.double() * (self.energy.double() / self.total).sqrt()[:, None]


def leading(rows: torch.Tensor, share: float, most: int, total: float | None = None) -> Directions:
    """As few leading directions of `rows` (n, d) as carry `share` of their energy; at most `most`. float64.

    Args:
        total: the energy that the share is one of; default: all of the rows'.
    """
    rows = rows.double()
    total = float(rows.square().sum()) if total is None else total
    wide = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    # The last direction must reach the share, rounding aside; a direction without energy is never kept.
    short = values.cumsum(0) < share * total * (1 - 1e-6)
    count = min(int(short.sum()) + 1, most, int((values > 1e-9 * values.sum()).sum()))
    values, vectors = values[:count], vectors[:, :count]
    basis = (vectors.T @ rows) / values.sqrt()[:, None] if wide else vectors.T
    return Directions(basis.contiguous(), values, total)
