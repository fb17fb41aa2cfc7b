"""Guard: what stands beside a training run so that what earlier tasks need is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from neft.errors import InputError
from neft.tasks import Example

#: What may stay of a change (k, d) in a module's trained rows; linear, and of the same shape and dtype.
Limit = Callable[[torch.Tensor], torch.Tensor]


class Guard(Protocol):
    """Limits, rehearses or penalises. A guard overrides what it needs; the rest does nothing."""

    def limits(self) -> Mapping[str, Limit]:
        """Module name -> limit of the changes in its trained rows.

        The trainer applies it to the rows' gradient and to what each optimiser step makes of them: an adaptive step
        along a limited gradient does not stay within the limit by itself.
        """
        return {}

    def rehearsed(self, count: int) -> Sequence[Example]:
        """Examples of earlier tasks to be trained on among `count` new ones."""
        return ()

    def penalty(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """What is added to a batch's mean loss, a scalar; None for nothing."""
        return None


class Limiter:
    """Keeps trained rows within limits: their gradients, and what every step of an optimiser makes of them."""

    def __init__(self, rows: Mapping[str, nn.Parameter], limits: Mapping[str, Limit]):
        """
        Args:
            rows: module name -> its rows in training, as `neft.tuner.model.trained_rows` gives them.

        Raises:
            InputError: a limit of a module of which no rows are trained.
        """
        unknown = sorted(limits.keys() - rows.keys())
        if unknown:
            raise InputError(f"a guard limits module {unknown[0]!r}, of which no rows are trained")
        self._limited = [(rows[name], limit) for name, limit in limits.items()]
        self._before: list[torch.Tensor] = []

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside, what backward gives the rows is limited; outside no longer, however training ended."""
        # A hook on the tensor sees each batch's gradient before it is added up, so that a limit is applied once.
        handles = [rows.register_hook(limit) for rows, limit in self._limited]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def before_step(self) -> None:
        """Note the rows as they are; to be called right before a step of the optimiser."""
        self._before = [rows.detach().clone() for rows, _ in self._limited]

    @torch.no_grad()
    def after_step(self) -> None:
        """Limit what the step has made of the rows."""
        for (rows, limit), before in zip(self._limited, self._before, strict=True):
            rows.copy_(before + limit(rows - before))
        self._before = []
