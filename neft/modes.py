"""Modes of a model: evaluation, gradient checkpointing in it, gradients that reach its inputs; each is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, each module's own mode, since some may be kept out of training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing inside in evaluation mode too, for the layers that have it turned on.

    transformers checkpoints a layer in training mode alone, where dropout would be drawn too.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = partial(_computed_anew, layer, layer.forward)
    try:
        yield
    finally:
        for layer, replaced in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if replaced is not None:
                vars(layer)["forward"] = replaced


def _computed_anew(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward that backward computes anew; without a cache, which would then be written a second time."""
    given = [None if isinstance(value, Cache) else value for value in args]
    named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    checkpoint: Callable[..., Any] = layer._gradient_checkpointing_func  # type: ignore[assignment]
    return checkpoint(partial(forward, **named), *given)


@contextmanager
def with_input_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Inside, embeddings require gradients, so that activations do while every weight is frozen.

    Not `enable_input_require_grads`: the model would forget the hooks of whoever had called it before, as gradient
    checkpointing does, and could not be rid of them again.
    """
    stems = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    embeddings = {id(found): found for stem in stems if (found := stem.get_input_embeddings()) is not None}
    handles = [each.register_forward_hook(_require_gradient) for each in embeddings.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _require_gradient(module: nn.Module, inputs: Any, output: Any) -> None:
    output.requires_grad_(True)
