"""Routing: a small signature of each task's inputs, and the router that finds the task of a request."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import encode_prompt
from neft.errors import InputError
from neft.evaluation import like_lengths
from neft.files import PathLike, load_tensors, save_tensors, understood
from neft.modes import in_evaluation
from neft.tasks import Example

_FILE_KIND = "neft-signature"

#: Training prompts that a signature is made from at most, and the share of them that it is fitted to. The others say
#: how far from the fit a prompt of the task lies that it has not seen.
_EXAMPLES, _FITTED = 128, 0.75

#: Principal components that a signature keeps at most.
_COMPONENTS = 8

#: A prompt is near a task when its log-likelihood is within so many standard deviations of the mean over those others.
_NEAR = 4.0


class _DeepEnoughError(Exception):
    """Ends a forward at the last layer that features need; it never leaves this module."""


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers that a causal model's tokens go through, in order.

    Raises:
        InputError: the model has an encoder and a decoder, or no list of layers.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # A list inside a layer holds the layer's parts (experts), not layers.
    outer = [
        module
        for name, module in lists.items()
        if len(module) and not any(name.startswith(f"{other}.") for other in lists)
    ]
    if len(outer) != 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"{type(model).__name__} has not one stack of layers, so its prompts cannot be told apart")
    return outer[0]


def features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    depth: int,
    max_length: int | None = None,
    batch_size: int = 16,
) -> torch.Tensor:
    """What the model's lowest layers make of each prompt: float32 (examples, 2 x width), on the CPU.

    The first half is the mean over the prompt's tokens, by which texts differ, the second the last token, by which
    questions differ. Each token's hidden state is first brought to a root mean square of 1, or the few tokens whose
    states are huge in many models (arXiv 2402.17762) would drown the others.

    Args:
        model: the base model, nothing laid on; of its layers only the lowest `depth` run.
        depth: a count of layers, from 1.
        max_length: tokens that are read of a prompt, its last ones.

    Raises:
        InputError: a prompt has no tokens, or the model's layers cannot be told.
    """
    prompts = [encode_prompt(tokenizer, example, max_length) for example in examples]
    if not all(prompts):
        raise InputError("a prompt has no tokens, so no task can be found for it; give the prompt template some text")
    found: dict[int, torch.Tensor] = {}
    for numbers in like_lengths(examples, batch_size):
        batch = [prompts[number] for number in numbers]
        states = _hidden_states(model, batch, depth, int(tokenizer.pad_token_id))
        for number, hidden in zip(numbers, states, strict=True):
            found[number] = torch.cat([hidden[: len(prompts[number])].mean(0), hidden[len(prompts[number]) - 1]])
    return torch.stack([found[number] for number in range(len(examples))])


@torch.inference_mode()
def _hidden_states(model: nn.Module, prompts: Sequence[Sequence[int]], depth: int, pad: int) -> torch.Tensor:
    """Hidden states after the layer `depth`, float32 (prompts, tokens, width), padded on the right, on the CPU."""
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _DeepEnoughError

    handle = layers_of(model)[depth - 1].register_forward_hook(stop)
    try:
        with in_evaluation(model):
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    except _DeepEnoughError:
        pass
    finally:
        handle.remove()
    hidden = seen[0].float()
    return (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)).cpu()


@dataclass(frozen=True)
class Signature:
    """What a task's prompts look like to the base model: a normal distribution of their features.

    It is that of probabilistic PCA (Tipping & Bishop 1999): a few principal components (k, f) with their variances (k,)
    around a mean (f,), and one `noise` variance in all other directions. The noise is measured on prompts that were not
    fitted to: among fewer prompts than dimensions, those that were say nothing of it.

    Attributes:
        near: the least log-likelihood of a prompt that counts as the task's.
        depth, max_length: as `features` takes them.
    """

    mean: torch.Tensor
    components: torch.Tensor
    variances: torch.Tensor
    noise: float
    near: float
    depth: int
    max_length: int | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        max_length: int | None = None,
        seed: int = 0,
    ) -> Signature:
        """The signature of a task with these training examples, of which some are drawn by the seed.

        Args:
            model: the base model, nothing laid on; a quarter of its layers run.

        Raises:
            InputError: as `features` has it.
        """
        drawn = random.Random(seed).sample(examples, min(_EXAMPLES, len(examples)))
        depth = max(1, len(layers_of(model)) // 4)
        return cls.fit(features(model, tokenizer, drawn, depth, max_length), depth, max_length)

    @classmethod
    def fit(cls, found: torch.Tensor, depth: int, max_length: int | None) -> Signature:
        """The signature of features (n, f) of a task's prompts, in an order of chance."""
        # scikit-learn takes a second to import.
        from sklearn.decomposition import PCA

        if len(found) < 4:
            # Too few to set some apart: only what is all but the same is near such a task.
            found = found.repeat(4, 1)
        count = int(_FITTED * len(found))
        fitted, unseen = found[:count].double(), found[count:].double()
        pca = PCA(min(_COMPONENTS, count - 1, found.shape[1] - 1), svd_solver="full").fit(fitted.numpy())
        mean, components, variances = (
            torch.from_numpy(each).float().contiguous()
            for each in (pca.mean_, pca.components_, pca.explained_variance_)
        )
        centred = unseen - mean
        within = centred @ components.double().T
        left = float(centred.square().sum() - within.square().sum()) / (len(unseen) * (found.shape[1] - len(variances)))
        # Prompts that are all the same leave nothing.
        noise = max(left, 1e-6)
        bare = cls(mean, components, variances.clamp_min(noise), noise, -math.inf, depth, max_length)
        likely = bare.log_likelihood(unseen)
        # Where all are alike, rounding is all that is between them: a nat for that.
        near = float(likely.mean() - _NEAR * likely.std(correction=0)) - 1
        return replace(bare, near=near)

    def read(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> torch.Tensor:
        """The features (examples, f) that this signature judges."""
        return features(model, tokenizer, examples, self.depth, self.max_length)

    def log_likelihood(self, found: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of each row of features (n, f), up to a constant that all signatures share: float64 (n,)."""
        centred = found.double() - self.mean.double()
        within = centred @ self.components.double().T
        left = centred.square().sum(-1) - within.square().sum(-1)
        variances = self.variances.double()
        spread = variances.log().sum() + (len(self.mean) - len(variances)) * math.log(self.noise)
        return -0.5 * ((within.square() / variances).sum(-1) + left / self.noise + spread)

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean, "components": self.components, "variances": self.variances}

    def save(self, path: PathLike) -> None:
        """Write the signature to one safetensors file."""
        described = {"noise": self.noise, "near": self.near, "depth": self.depth, "max_length": self.max_length}
        save_tensors(path, _FILE_KIND, self._tensors(), described)

    @classmethod
    def load(cls, path: PathLike) -> Signature:
        """
        Raises:
            InputError: no such file, or not a signature.
            FailedError: the file is corrupt.
        """
        tensors, described = load_tensors(path, _FILE_KIND)
        with understood(path):
            return cls(
                tensors["mean"],
                tensors["components"],
                tensors["variances"],
                described["noise"],
                described["near"],
                described["depth"],
                described["max_length"],
            )


class Router:
    """Finds the task whose prompts a request looks like, among those whose signatures it has.

    Example:
        >>> router = Router({"films": films, "news": news})
        >>> router.route(model, tokenizer, [Example("Review: a delight\\nSentiment:", "")])
        ['films']
    """

    def __init__(self, signatures: Mapping[str, Signature]) -> None:
        """
        Raises:
            InputError: no signature, or signatures that read prompts in different ways.
        """
        self.signatures = MappingProxyType(dict(signatures))
        ways = {(each.depth, each.max_length, len(each.mean)) for each in self.signatures.values()}
        if len(ways) != 1:
            given = ", ".join(self.signatures) or "none"
            raise InputError(f"a router needs signatures that were made alike, of one base model; given: {given}")

    def route(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, requests: Sequence[str | Example]
    ) -> list[str | None]:
        """The name of each request's task, or None when it is near none.

        Args:
            model: the base model, nothing laid on.
            requests: prompts as a task's template renders them, or examples with such prompts.
        """
        examples = [Example(each, "") if isinstance(each, str) else each for each in requests]
        reader = next(iter(self.signatures.values()))
        return self.nearest(reader.read(model, tokenizer, examples))

    def nearest(self, found: torch.Tensor) -> list[str | None]:
        """The name of the likeliest task for each row of features (n, f), or None when no task is near."""
        names = list(self.signatures)
        likely = torch.stack([each.log_likelihood(found) for each in self.signatures.values()], dim=-1)
        near = likely >= torch.tensor([each.near for each in self.signatures.values()], dtype=torch.float64)
        best = likely.masked_fill(~near, -math.inf).argmax(-1)
        return [
            names[place] if some else None for place, some in zip(best.tolist(), near.any(-1).tolist(), strict=True)
        ]
