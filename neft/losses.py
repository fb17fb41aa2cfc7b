"""The loss of completions: cross entropy of a causal model, its head run only where a completion is predicted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from neft.encoding import IGNORED


def takes_positions(model: nn.Module) -> bool:
    """Whether the model runs its head at chosen positions alone, if asked to (transformers' `logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def completion_loss(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a batch's labelled tokens, a scalar, and how many they are.

    The head of a small model with a large vocabulary costs a third of a step, and most of its memory, when it runs on
    every token of the prompts too.

    Args:
        model: a causal language model whose forward takes `logits_to_keep`, or a PEFT model around one.
        inputs: `input_ids`, `attention_mask` and `labels` (batch, tokens); unlabelled tokens are `IGNORED`.
    """
    targets = inputs["labels"][:, 1:]
    positions = (targets != IGNORED).any(dim=0).nonzero().squeeze(-1)
    read = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**read, use_cache=False, logits_to_keep=positions).logits.float()
    targets = targets[:, positions]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()
