"""The `weight` scorer: the size of each neuron's weights, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch
from neft.neurons import NeuronSpace
from neft.scoring.per_neuron import summed_over_weights
from neft.scoring.scores import Scores


@dataclass(frozen=True)
class Weight:
    """L2 norm of the neuron's rows and columns taken together: magnitude, the data-free baseline of pruning."""

    name: ClassVar[str] = "weight"
    needs_data: ClassVar[bool] = False

    def score(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        space: NeuronSpace,
        batches: Sequence[Batch],
        seed: int,
    ) -> Scores:
        squares = summed_over_weights(
            model, space, lambda module: model.get_parameter(f"{module}.weight").detach().double().square()
        )
        return Scores(space, {name: total.sqrt() for name, total in squares.items()})
