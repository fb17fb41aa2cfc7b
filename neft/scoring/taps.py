"""Taps: see every neuron's activation, and the loss's gradient in it, while a model runs over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from neft.encoding import IGNORED, Batch
from neft.losses import completion_loss, takes_positions
from neft.modes import checkpointed, hooked, in_evaluation, with_input_gradients
from neft.neurons import NeuronSpace, Site

#: Called for each site and batch with the activations (batch, tokens, neurons, repeats), the gradient of the summed
#: loss in them (None without backward), and the mask of real tokens (batch, tokens).
Collect = Callable[[Site, torch.Tensor, torch.Tensor | None, torch.Tensor], None]


class _Tap(torch.autograd.Function):
    """Identity that hands activation and gradient to a callback. As a Function it survives gradient checkpointing."""

    @staticmethod
    def forward(ctx: Any, activation: torch.Tensor, see: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(activation)
        ctx.see = see
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (activation,) = ctx.saved_tensors
        ctx.see(activation, gradient)
        return gradient, None


def run_tapped(
    model: nn.Module, space: NeuronSpace, batches: Sequence[Batch], collect: Collect, backward: bool
) -> None:
    """Run `model` over `batches` in evaluation mode and hand each site's activations to `collect`.

    With `backward`, weights stay frozen and only activations get gradients, so that no weight gradient is ever held.
    """
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(in_evaluation(model))
        stack.enter_context(_frozen(model))
        seen: dict[str, torch.Tensor] = {}
        for site in space.sites:
            stack.enter_context(_hooked(model, site, collect, seen, backward))
        if backward:
            stack.enter_context(with_input_gradients(cast(PreTrainedModel, model)))
            stack.enter_context(checkpointed(model))
        for batch in batches:
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            seen["tokens"] = inputs["attention_mask"].bool()
            seen["targets"] = inputs["labels"] != IGNORED
            if backward:
                _summed_loss(model, inputs).backward()
            else:
                run_body(model, inputs)


def _summed_loss(model: nn.Module, inputs: Batch) -> torch.Tensor:
    if takes_positions(model):
        return completion_loss(model, inputs)[0]
    return cast(torch.Tensor, model(**inputs).loss * target_count(model, inputs["labels"]))


@torch.no_grad()
def run_body(model: nn.Module, inputs: Batch) -> None:
    """Forward, with as little of the head as the model allows: no activation that is tapped comes after it."""
    if takes_positions(model):
        model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False, logits_to_keep=1)
    else:
        model(**inputs)


def target_count(model: nn.Module, labels: torch.Tensor) -> int:
    """Tokens that a transformers loss averages over: a causal model shifts its labels by one."""
    causal = not getattr(model.config, "is_encoder_decoder", False) and "MaskedLM" not in type(model).__name__
    return int(((labels[:, 1:] if causal else labels) != IGNORED).sum())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Frozen weights inside; `requires_grad` as before outside."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _hooked(
    model: nn.Module, site: Site, collect: Collect, seen: dict[str, torch.Tensor], backward: bool
) -> Iterator[None]:
    part = site.tap
    positions = torch.from_numpy(part.positions(np.arange(site.size)))
    # In an encoder-decoder model the decoder runs over the targets, but its cross-attention's keys over the inputs.
    cross = part.side == "row" and "EncDecAttention" in part.module
    decoder = getattr(model.config, "is_encoder_decoder", False) and "decoder" in part.module and not cross

    def see(activation: torch.Tensor, gradient: torch.Tensor | None) -> None:
        mask = seen["targets" if decoder else "tokens"]

        def of_neurons(tensor: torch.Tensor) -> torch.Tensor:
            # Some models flatten batch and tokens before the feed-forward block.
            return tensor.detach()[..., positions.to(tensor.device)].reshape(*mask.shape, *positions.shape)

        collect(site, of_neurons(activation), None if gradient is None else of_neurons(gradient), mask)

    def tap(tensor: torch.Tensor) -> torch.Tensor:
        if backward and tensor.requires_grad:
            return _Tap.apply(tensor, see)
        if not backward:
            see(tensor, None)
        return tensor

    with hooked(model, part, tap):
        yield
