"""Frozen layers: the hidden states that enter a model's lowest trained layer, kept so that those below run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from neft.errors import InputError
from neft.modes import replaced_forwards

Forward = Callable[..., Any]

_KEY = "training.cache_frozen_layers"


class FrozenLayers:
    """The layers below the lowest one with trainable parameters, and the hidden states that leave them.

    The first time that an example is seen, those layers run, without gradients, and what leaves them is kept on the
    CPU, in its own dtype and without padding. Afterwards they pass on what was kept. The model's own forward computes
    embeddings, masks and positions as ever. One instance serves one training: neither the frozen weights nor the
    examples may change meanwhile. Each process keeps the examples that it has seen itself.

    Example:
        >>> frozen = FrozenLayers(model)
        >>> with frozen.batch(numbers, lengths):
        ...     loss = model(**inputs).loss
        >>> loss.backward()
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a transformers model that reads tokens in one stack of layers, or a PEFT model around one.

        Raises:
            InputError: no layer lies below the lowest trained one, something outside the layers is trained, or the
                model's layers cannot be told.
        """
        unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
        base = unwrap() if unwrap else model
        name, layers = _stack_of(base)
        lowest = next(place for place, layer in enumerate(layers) if _is_trained(layer))
        if lowest == 0:
            raise InputError(
                f"{_KEY}: the lowest layer that is trained is the first one, {name}.0, so there is nothing to keep; "
                "choose neurons of higher layers alone, with method.selection.lowest_layer, or set it to false"
            )
        above = {id(module) for layer in layers[lowest:] for module in layer.modules()}
        others = {path: module for path, module in base.named_modules() if id(module) not in above}
        _refuse_trained(others)
        self._below = list(layers[:lowest])
        self._dropping = {path: module for path, module in others.items() if _dropout(module) > 0}
        self._states: dict[int, torch.Tensor] = {}
        #: What a layer returns after the hidden states: None for a layer that returns a bare tensor.
        self._rest: tuple[None, ...] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of memory that the kept hidden states take."""
        return sum(states.nbytes for states in self._states.values())

    @contextmanager
    def batch(self, examples: Sequence[int], lengths: Sequence[int]) -> Iterator[None]:
        """Run the model, inside, on a batch from the lowest trained layer up, where all of its examples are known.

        A batch with an example that is new runs whole. Every layer is as before when the context ends.

        Args:
            examples: a number for each row of the batch, the same one whenever the same example comes.
            lengths: how many tokens each row has; padding stands on the right.

        Raises:
            InputError: the layers below draw at random (dropout), return more than hidden states, or an example has
                another length than before.
        """
        self._refuse_dropout()
        if all(number in self._states for number in examples):
            forwards = self._recalling(examples, lengths)
        else:
            forwards = self._keeping(examples, lengths)
        with replaced_forwards(self._below, forwards):
            yield

    def _keeping(self, examples: Sequence[int], lengths: Sequence[int]) -> list[Forward]:
        """Forwards that compute without gradients; the last one keeps what it returns."""
        *lower, last = (torch.no_grad()(layer.forward) for layer in self._below)

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = last(*args, **kwargs)
            self._keep(output, examples, lengths)
            return output

        return [*lower, keep]

    def _keep(self, output: Any, examples: Sequence[int], lengths: Sequence[int]) -> None:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, torch.Tensor) or any(each is not None for each in rest):
            raise InputError(
                f"{_KEY}: the model's layers return more than hidden states, which keeping those would lose; "
                "set it to false"
            )
        self._rest = (None,) * len(rest) if isinstance(output, tuple) else None
        kept = hidden.detach().cpu()
        for number, states, length in zip(examples, kept, lengths, strict=True):
            if number not in self._states:
                self._states[number] = states[:length].clone()

    def _recalling(self, examples: Sequence[int], lengths: Sequence[int]) -> list[Forward]:
        """Forwards that compute nothing: the first one gives the kept hidden states, the others pass them on."""
        kept = [self._states[number] for number in examples]
        for number, states, length in zip(examples, kept, lengths, strict=True):
            if len(states) != length:
                raise InputError(
                    f"{_KEY}: example {number} has {length} tokens, but had {len(states)} when its hidden states were "
                    "kept; give every example a number of its own"
                )

        def recall(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._returned(_padded(kept, hidden_states))

        def pass_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._returned(hidden_states)

        return [recall, *[pass_on] * (len(self._below) - 1)]

    def _returned(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which the model's layers return them."""
        return hidden if self._rest is None else (hidden, *self._rest)

    def _refuse_dropout(self) -> None:
        for name, module in self._dropping.items():
            if module.training:
                raise InputError(
                    f"{_KEY}: {name or type(module).__name__} drops out {_dropout(module):.0%} at random, so its "
                    "hidden states differ from epoch to epoch; use a model whose config has no dropout, or set it to "
                    "false"
                )


def _padded(states: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The states, each (length, width), as one tensor (batch, longest, width) of the shape and device of `like`.

    The padding is zeros: no token sees it, and the loss leaves it out.
    """
    # Pinned memory lets the copy to an accelerator overlap with its work.
    batch = torch.zeros(like.shape, dtype=states[0].dtype, pin_memory=like.is_cuda)
    for row, each in zip(batch, states, strict=True):
        row[: len(each)] = each
    return batch.to(like.device, non_blocking=True)


def _stack_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and layers of the one stack that holds trainable parameters."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{_KEY}: the model has an encoder and a decoder, and keeping hidden states serves models of one stack; "
            "set it to false"
        )
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    trained = {
        name: layers
        for name, layers in lists.items()
        # A list inside a layer holds the layer's parts (experts), not layers.
        if _is_trained(layers) and not any(name.startswith(f"{other}.") for other in lists)
    }
    if len(trained) != 1:
        found = f"several lists of layers are trained ({', '.join(trained)})" if trained else "no layer is trained"
        raise InputError(f"{_KEY}: {found}, so the lowest trained layer cannot be told; set it to false")
    return next(iter(trained.items()))


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _refuse_trained(modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.requires_grad:
                raise InputError(
                    f"{_KEY}: {parameter_name} is trained too, outside the layers, and what is kept may depend on it; "
                    "train neurons alone, or set it to false"
                )


def _dropout(module: nn.Module) -> float:
    """The largest probability with which a module drops something out, as a dropout layer or by an attribute."""
    rates = [float(module.p)] if isinstance(module, _DropoutNd) else []
    rates += [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return max(rates, default=0.0)
