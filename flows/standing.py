"""Standing: the model as it stands after the tasks learnt so far."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.config import ModelSpec
from neft.audit import state_digest
from neft.errors import RecordError
from neft.models import load_base
from registry import Entry


class Standing:
    """The model as it stands, the digest of that state, and the entries whose overlays it holds, oldest first."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, config: ModelSpec):
        self._config = config
        self.chain: list[Entry] = []
        self.load_base()
        self.state = state_digest(self.model)

    def load_base(self) -> None:
        """Put the base model in place of what there is; `state` stays what it was."""
        if hasattr(self, "model"):
            # A second model may not fit beside it.
            del self.model
        self.model, self.tokenizer = load_base(self._config.name, self._config.dtype)
        nn.Module.to(self.model, torch.accelerator.current_accelerator() or torch.device("cpu"))

    def settle(self) -> None:
        """Take the weights as they are for the state."""
        self.state = state_digest(self.model)

    def bring_back(self, task: str, lay_on: Callable[[PreTrainedModel], object]) -> None:
        """Bring the model back to its state, bit for bit, after `task` failed: what `lay_on` makes of the base model.

        Raises:
            RecordError: that is another state.
        """
        self.load_base()
        lay_on(self.model)
        if state_digest(self.model) != self.state:
            raise RecordError(
                f"task {task!r} failed, and the model cannot be brought back to what it was before; "
                "run the same command again to go on from what is recorded"
            )
