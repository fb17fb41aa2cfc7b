"""The methods under measurement, each made ready to train one model: full, frozen, masked, PEFT's, and neft's own.

Needs torch, transformers and peft alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from neft.frozen_layers import FrozenLayers
from neft.neurons import NeuronSet, NeuronSpace
from neft.tuner import NeftConfig
from neft.tuner.layer import Path

#: Shapes of published models; the weights are random.
SHAPES = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}

_FFN = ["gate_proj", "up_proj", "down_proj"]
_SHARE = 0.1


@dataclass(frozen=True)
class Learner:
    """A model made ready to train: its parameters in training, what masks their gradients, what a checkpoint holds."""

    model: nn.Module
    trained: list[nn.Parameter]
    #: Parameters that end up different from the base model's.
    parameters: int
    checkpoint_bytes: int
    #: Multiplied into the gradient of each of `trained`, where weights are masked.
    masks: list[torch.Tensor] = field(default_factory=list)
    frozen_layers: FrozenLayers | None = None


def fresh_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A random, frozen model of a shape: matrices with a deviation of 0.02, norms of ones."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    # Its frequencies are a buffer, which the way over `meta` has emptied.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval()


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model again over the same memory, so that many methods fit beside each other."""
    with torch.device("meta"):
        other = LlamaForCausalLM(model.config)
    for name, module in model.named_modules():
        there = other.get_submodule(name)
        for key, parameter in module.named_parameters(recurse=False):
            setattr(there, key, nn.Parameter(parameter.data, requires_grad=False))
        for key, buffer in module.named_buffers(recurse=False):
            setattr(there, key, buffer)
    other.tie_weights()
    return other.eval()


def chosen(model: LlamaForCausalLM, lowest_layer: int = 0, seed: int = 0) -> NeuronSet:
    """A random tenth of the model's feed-forward neurons, spread evenly over the layers from `lowest_layer` up."""
    space, generator = NeuronSpace.from_model(model), np.random.default_rng(seed)
    sites = space.sites[lowest_layer:]
    count = round(_SHARE * len(space) / len(sites))
    return NeuronSet(space, {site.name: generator.choice(site.size, count, replace=False) for site in sites})


def full(model: LlamaForCausalLM) -> Learner:
    """Every weight is trained."""
    model.requires_grad_(True)
    trained = list(model.parameters())
    return Learner(model, trained, _count(trained), _bytes(trained))


def frozen(model: LlamaForCausalLM) -> Learner:
    """Nothing is trained; backward goes to the inputs of the lowest layer with chosen neurons: the floor."""

    def require(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].requires_grad_(True), *inputs[1:])

    model.model.layers[0].mlp.register_forward_pre_hook(require)
    return Learner(model, [], 0, 0)


def gradient_mask(model: LlamaForCausalLM) -> Learner:
    """Whole feed-forward weights with their gradients masked to the chosen neurons (what the NeFT authors do)."""
    trained, masks, parameters = [], [], 0
    for name, rows in chosen(model).rows().items():
        weight = model.get_submodule(name).weight
        mask = torch.zeros_like(weight)
        mask.index_fill_(int(rows.side == "column"), torch.from_numpy(rows.positions.copy()).to(weight.device), 1.0)
        weight.requires_grad_(True)
        trained.append(weight)
        masks.append(mask)
        parameters += int(mask.sum(dtype=torch.float64))
    return Learner(model, trained, parameters, _bytes(trained), masks)


def lora_matched(model: LlamaForCausalLM) -> Learner:
    """LoRA on the feed-forward modules with as many parameters as the chosen neurons have."""
    return _adapted(model, LoraConfig(r=_rank(model), target_modules=_FFN))


def lora_r8(model: LlamaForCausalLM) -> Learner:
    """LoRA of rank 8 on the feed-forward modules."""
    return _adapted(model, LoraConfig(r=8, target_modules=_FFN))


def shira(model: LlamaForCausalLM) -> Learner:
    """SHiRA, with as many sparse entries as the chosen neurons have."""
    return _adapted(model, ShiraConfig(r=_rank(model), target_modules=_FFN, random_seed=0))


def super_tuning(model: LlamaForCausalLM) -> Learner:
    """Super-Tuning, with as many sparse entries as the chosen neurons have."""
    return _adapted(model, SupertuningConfig(sparsity=1 - _SHARE, target_modules=_FFN))


def neft(model: LlamaForCausalLM) -> Learner:
    """neft, on its default path: the chosen rows in the base weight."""
    return _neurons(model)


def neft_side(model: LlamaForCausalLM) -> Learner:
    """neft, with the change added beside the base weight."""
    return _neurons(model, path="side")


def neft_upper(model: LlamaForCausalLM) -> Learner:
    """neft, with as many neurons, of the upper half of the layers."""
    return _neurons(model, lowest_layer=len(model.model.layers) // 2)


def neft_upper_cached(model: LlamaForCausalLM) -> Learner:
    """neft in the upper half of the layers, with what enters them kept over epochs."""
    learner = neft_upper(model)
    return replace(learner, frozen_layers=FrozenLayers(learner.model))


METHODS: dict[str, Callable[[LlamaForCausalLM], Learner]] = {
    "full": full,
    "frozen": frozen,
    "gradient-mask": gradient_mask,
    "lora-matched": lora_matched,
    "lora-r8": lora_r8,
    "shira": shira,
    "super-tuning": super_tuning,
    "neft": neft,
    "neft-side": neft_side,
    "neft-upper": neft_upper,
    "neft-upper-cached": neft_upper_cached,
}

#: Those that hold a gradient and an optimiser state for dense weights.
DENSE = ("full", "gradient-mask")


def _neurons(model: LlamaForCausalLM, lowest_layer: int = 0, path: Path = "inplace") -> Learner:
    return _adapted(model, NeftConfig.from_neurons(chosen(model, lowest_layer), path=path))


def _adapted(model: LlamaForCausalLM, config: PeftConfig) -> Learner:
    adapted = get_peft_model(model, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    kept = get_peft_model_state_dict(adapted, save_embedding_layers=False).values()
    return Learner(adapted, trained, _count(trained), _bytes(kept))


def _rank(model: LlamaForCausalLM) -> int:
    """The rank with as many parameters in the feed-forward modules as the chosen neurons have."""
    config = model.config
    each_rank = config.num_hidden_layers * 3 * (config.hidden_size + config.intermediate_size)
    return round(chosen(model).parameters / each_rank)


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
