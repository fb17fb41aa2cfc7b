"""What the tests of the method share: choosing neurons, adapting a model, comparing states bit for bit."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from neft import NeftConfig, NeuronSet, NeuronSpace
from neft.neurons import Kind
from neft.tuner import NeftLinear
from tests.tiny import batch, tiny_model

Inputs = dict[str, torch.Tensor]
State = dict[str, torch.Tensor]


def draw(space: NeuronSpace, each: int = 5, seed: int = 0) -> NeuronSet:
    """`each` random neurons of every site."""
    generator = torch.Generator().manual_seed(seed)
    return NeuronSet(space, {site.name: torch.randperm(site.size, generator=generator)[:each] for site in space.sites})


def split(space: NeuronSpace) -> tuple[NeuronSet, NeuronSet]:
    """Two disjoint sets, of the even and of the odd neurons below ten of every site."""
    first, second = ({site.name: range(start, 10, 2) for site in space.sites} for start in (0, 1))
    return NeuronSet(space, first), NeuronSet(space, second)


def adapted(
    family: str = "llama", *kinds: Kind, dtype: torch.dtype = torch.float32, train: bool = False
) -> tuple[PeftModel, NeuronSet, Inputs]:
    """A tiny model with a NEFT adapter whose rows have moved away from the base, its neurons, and a batch."""
    model = tiny_model(family).to(dtype)
    neurons = draw(NeuronSpace.from_model(model, kinds or ("ffn",)))
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons)).train(train)
    jitter(peft_model)
    return peft_model, neurons, batch(model)


@torch.no_grad()
def jitter(peft_model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Move an adapter's rows, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(peft_model):
        if adapter in layer.neft_rows:
            rows = layer.neft_rows[adapter]
            rows.add_(0.1 * torch.randn(rows.shape, generator=generator).to(rows.dtype))


def layers(model: nn.Module) -> list[NeftLinear]:
    return [module for module in model.modules() if isinstance(module, NeftLinear)]


def state(model: nn.Module) -> State:
    """A copy of a base model's weights by their plain names, without what adapters add."""
    return {
        name.replace(".base_layer.", "."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if ".neft_" not in name
    }


def differing(first: State, second: State) -> list[str]:
    """Names of the weights that are not bit-identical, or that only one of the states has."""
    return [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]


def held(peft_model: PeftModel) -> State:
    """What the base weights hold at this moment, laid rows included, read past every hook."""
    return {
        name.replace(".base_layer.", "."): parameter.detach().clone()
        for name, parameter in peft_model.base_model.model.named_parameters(remove_duplicate=False)
        if ".neft_" not in name
    }


@torch.no_grad()
def logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    result: torch.Tensor = model(**inputs).logits
    return result


def gradients(model: nn.Module, inputs: Inputs, adapter: str = "default") -> State:
    """Backward of the loss; the gradients of an adapter's rows, which are cleared."""
    model(**inputs).loss.backward()
    found = collect(model, adapter)
    model.zero_grad()
    return found


def collect(model: nn.Module, adapter: str = "default") -> State:
    """The gradients that an adapter's rows have now, by module name."""
    return {
        name.removeprefix("base_model.model."): module.neft_rows[adapter].grad.clone()
        for name, module in model.named_modules()
        if isinstance(module, NeftLinear) and adapter in module.neft_rows
    }


def train(model: nn.Module, inputs: Inputs, steps: int = 3) -> torch.optim.Optimizer:
    """A few AdamW steps with weight decay on whatever is trainable."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    return optimizer


def moved_base(model: PreTrainedModel) -> State:
    """A state of other weights for the same model."""
    return {name: tensor + 0.5 for name, tensor in state(model).items()}
