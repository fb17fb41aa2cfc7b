"""Sums over each neuron's own weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from neft.neurons import NeuronSpace
from neft.overlay import storage_dim


def summed_over_weights(
    model: nn.Module, space: NeuronSpace, elementwise: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Site name -> float64 (site size,): the sum, over all weights of each neuron, of an elementwise quantity.

    Args:
        elementwise: module name -> a tensor shaped like that module's weight.
    """
    totals = {}
    for site in space.sites:
        total = torch.zeros(site.size, dtype=torch.float64)
        for part in site.parts:
            dim = storage_dim(model.get_submodule(part.module), part.side)
            along = elementwise(part.module).double().sum(1 - dim).cpu()
            total += along[torch.from_numpy(part.positions(np.arange(site.size)))].sum(-1)
        totals[site.name] = total
    return totals
