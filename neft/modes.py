"""Modes of a model: evaluation, checkpointing in it, input gradients, hooks and other forwards; each is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from neft.neurons import Part


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
    with replaced_forwards(layers, [partial(_computed_anew, layer, layer.forward) for layer in layers]):
        yield


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module computes by another forward; outside by its own, or what somebody else had put there."""
    before = [vars(module).get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, replaced in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if replaced is not None:
                vars(module)["forward"] = replaced


def _computed_anew(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward that backward computes anew; without a cache, which would then be written a second time."""
    given = [None if isinstance(value, Cache) else value for value in args]
    named = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    # transformers sets it on the layer, where nn.Module is annotated to hold tensors and modules alone.
    checkpoint = cast(Callable[..., Any], layer._gradient_checkpointing_func)
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


@contextmanager
def hooked(model: nn.Module, part: Part, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, the activations of a site's `part` (its tap) go through `change`: a column's input, or a row's output."""
    module = model.get_submodule(part.module)
    if part.side == "column":
        handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()
