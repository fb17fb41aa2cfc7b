"""What PEFT asks of every method, asked of NEFT: one table of models, times both paths, times checks.

The rows are those of PEFT's own matrix (custom models, decoders, encoder-decoders, sequence classification, feature
extraction), and the checks are the same in kind, though stricter where NEFT promises bits. What PEFT checks of other
methods and NEFT has no part in stands in `NOT_APPLICABLE` with the reason; nothing is skipped.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import check_hotswap_configs_compatible
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

from neft import InputError, NeftConfig, NeuronSet, NeuronSpace
from neft.architectures import Anatomy, FeedForward
from neft.neurons import Part, Site
from neft.overlay import storage_dim, write_rows
from neft.tuner import NeftLinear
from tests.neft.helpers import Inputs, State, differing, layers, split
from tests.tiny import batch, tiny_model

ROOT = Path(__file__).parents[2]
PATHS = ("inplace", "side")

#: What PEFT's matrix checks of other methods -> why NEFT has no such row. `REFUSED` tries what can be tried.
NOT_APPLICABLE: dict[str, str] = {
    "hotswap": "PEFT swaps LoRA's weights alone and refuses every other method",
    "mixed adapter types (PeftMixedModel)": "PEFT keeps a closed list of methods that may be mixed",
    "layers_to_transform, layers_pattern, exclude_modules, all-linear, regular expressions": (
        "a neuron set names its modules exactly"
    ),
    "target_parameters": "a neuron is a row or column of a module's weight; bare parameters have no forward to hook",
    "convolutions, embeddings, multi-head attention modules": "they compute no rows of a matrix by a linear forward",
    "bias='all' and adapters with biases": "biases are no part of a neuron and stay frozen",
    "rank and alpha patterns, scaling, rescale_adapter_scale": "rows are values, not a scaled product of factors",
    "init_lora_weights, initialisations that change the base": "rows start as the base's own, so there is one start",
    "dropout": "there is no branch beside the weight to drop",
    "fan_in_fan_out": "the layer reads the orientation off the module",
    "trainable_token_indices, ensure_weight_tying": "fields of LoRA's config; embeddings hold no neurons",
    "DoRA, aLoRA, replicate_layers, AdaLoRA's budget, VeRA's shared projections": "parts of other methods",
    "conversion to LoRA": "trained rows have full rank, so LoRA factors of a useful size do not hold them",
    "path_initial_model_for_weight_conversion": "it undoes an initialisation that changes the base, which NEFT has not",
    "prompt learning": "there are no virtual tokens",
    "prepare_model_for_kbit_training": "it freezes and upcasts the base, which needs no preparation here",
    "8 and 4 bits, several devices, FSDP, DeepSpeed, torch.compile": "not of the matrix; the GPU rows have their tests",
    "several active adapters over a module saved whole": "PEFT lets one copy of it be active, in any method",
    "uploading to the Hub": "the tests have no network",
}


# --- custom models ---


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 6, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(x.to(self.lin0.weight.dtype)))).log_softmax(dim=-1)


class Block(nn.Module):
    """A residual block of a nested model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(10)
        self.mlp = nn.ModuleDict({"up": nn.Linear(10, 16), "down": nn.Linear(16, 10, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp["down"](torch.tanh(self.mlp["up"](self.norm(x))))


class Nested(nn.Module):
    """Blocks in a list, behind and before layers of no neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(10, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.leave = nn.Sequential(nn.Dropout(0.1), nn.Linear(10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x.to(self.enter.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class EmbeddedConv1D(nn.Module):
    """An embedding and GPT-2's transposed linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 12)
        self.up = Conv1D(18, 12)
        self.down = Conv1D(12, 18)
        nn.init.normal_(self.up.weight)
        nn.init.normal_(self.down.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.embedding(ids))))


class Recurrent(nn.Module):
    """One layer that is called three times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.step.weight.dtype)
        for _ in range(3):
            x = torch.tanh(self.step(x))
        return x


def feed_forward(up: str, down: str) -> Callable[[nn.Module], NeuronSpace]:
    anatomy = Anatomy(ffn=(FeedForward(up=up, down=down),))
    return lambda model: NeuronSpace.from_model(model, ["ffn"], anatomy)


def by_hand(module: str, side: Any, size: int, width: int) -> Callable[[nn.Module], NeuronSpace]:
    """The rows, or the columns, of one module of a model that has no feed-forward block."""
    site = Site(f"{module}.{side}s", "ffn_in", size, (Part(module, side, width),))
    return lambda model: NeuronSpace((site,), sum(p.numel() for p in model.parameters()))


def ffn_alone(model: nn.Module) -> NeuronSpace:
    return NeuronSpace.from_model(model, ["ffn"])


def ffn_and_attention(model: nn.Module) -> NeuronSpace:
    return NeuronSpace.from_model(model, ["ffn", "attention"])


# --- the table ---


def numbers(_: nn.Module) -> Inputs:
    return {"x": torch.randn(4, 10, generator=torch.Generator().manual_seed(0))}


def ids(_: nn.Module) -> Inputs:
    return {"ids": torch.randint(0, 32, (4, 5), generator=torch.Generator().manual_seed(0))}


def unlabelled(model: Any) -> Inputs:
    inputs = batch(model, rows=4, tokens=6)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Subject:
    """A row of the matrix: a model, what it reads, where its neurons are, and the path that the adapter takes."""

    name: str
    make: Callable[[], nn.Module]
    inputs_of: Callable[[Any], Inputs]
    space_of: Callable[[nn.Module], NeuronSpace] = ffn_and_attention
    task_type: TaskType | None = None
    saved_whole: tuple[str, ...] = ()
    path: str = "inplace"

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh copy of the plain model, in evaluation mode."""
        return copy.deepcopy(_made(self.name)).to(dtype)

    @property
    def inputs(self) -> Inputs:
        return _inputs(self.name)

    def neurons(self, part: int = 0) -> NeuronSet:
        """Parts 0 and 1 are disjoint."""
        return _parts(self.name)[part]

    def config(self, part: int = 0, **options: Any) -> NeftConfig:
        options = {"path": self.path, "task_type": self.task_type} | options
        if self.saved_whole:
            options["modules_to_save"] = list(self.saved_whole)
        return NeftConfig.from_neurons(self.neurons(part), **options)

    def adapted(
        self, *adapters: str, moved: bool = True, dtype: torch.dtype = torch.float32, **options: Any
    ) -> PeftModel:
        """The model with adapters (`default`) of disjoint neurons; the first is active."""
        first, *others = adapters or ("default",)
        model = get_peft_model(self.base(dtype), self.config(), adapter_name=first, **options).eval()
        for place, name in enumerate(others, 1):
            model.add_adapter(name, self.config(place % 2))
        for place, name in enumerate((first, *others) if moved else ()):
            move(model, name, seed=place)
        return model

    def gives(self, model: nn.Module) -> torch.Tensor:
        return output(model, self.inputs).detach()


CUSTOM = [
    Subject("mlp", Mlp, numbers, feed_forward("lin0", "lin1")),
    Subject("mlp_without_bias", lambda: Mlp(bias=False), numbers, feed_forward("lin0", "lin1")),
    Subject("nested", Nested, numbers, feed_forward("mlp.up", "mlp.down")),
    Subject("nested_head_saved", Nested, numbers, feed_forward("mlp.up", "mlp.down"), saved_whole=("leave.1",)),
    Subject("conv1d", EmbeddedConv1D, ids, feed_forward("up", "down")),
    Subject("recurrent_rows", Recurrent, numbers, by_hand("step", "row", 10, 10)),
    Subject("recurrent_columns", Recurrent, numbers, by_hand("step", "column", 10, 10)),
]
DECODERS = [
    Subject(family, functools.partial(tiny_model, family), unlabelled, task_type=TaskType.CAUSAL_LM)
    for family in ("llama", "qwen2", "gemma", "gpt2", "gpt_neox", "opt")
]
SEQ2SEQ = [
    Subject(
        family,
        functools.partial(tiny_model, family),
        lambda model: unlabelled(model) | {"decoder_input_ids": unlabelled(model)["input_ids"][:, :4]},
        task_type=TaskType.SEQ_2_SEQ_LM,
    )
    for family in ("t5", "t5_gated")
]
CLASSIFIERS = [
    Subject(
        f"{family}_classifier",
        lambda make=make, family=family: make(tiny_model(family).config),
        unlabelled,
        ffn_alone,
        TaskType.SEQ_CLS,
        (head,),
    )
    for family, make, head in (
        ("llama", LlamaForSequenceClassification, "score"),
        ("gpt2", GPT2ForSequenceClassification, "score"),
        ("bert", BertForSequenceClassification, "classifier"),
    )
]
FEATURES = [
    Subject(
        "bert_features",
        lambda: BertModel(tiny_model("bert").config, add_pooling_layer=False),
        unlabelled,
        task_type=TaskType.FEATURE_EXTRACTION,
    )
]
GENERATORS = [*DECODERS, *SEQ2SEQ]
TRANSFORMERS = [*GENERATORS, *CLASSIFIERS, *FEATURES]
SUBJECTS = [*CUSTOM, *TRANSFORMERS]
BY_NAME = {subject.name: subject for subject in SUBJECTS}
#: One of each way to hold weights, for checks that PEFT's own code decides more than the model does.
SOME = [BY_NAME[name] for name in ("mlp", "nested_head_saved", "conv1d", "llama", "t5", "bert_classifier")]


@functools.cache
def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    # Frozen as PEFT freezes it, since attention takes another kernel where a bias is trained.
    return BY_NAME[name].make().eval().requires_grad_(False)


@functools.cache
def _inputs(name: str) -> Inputs:
    return BY_NAME[name].inputs_of(_made(name))


@functools.cache
def _parts(name: str) -> tuple[NeuronSet, NeuronSet]:
    return split(BY_NAME[name].space_of(_made(name)))


def rows(subjects: list[Subject], paths: tuple[str, ...] = PATHS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "subject",
        [
            pytest.param(replace(subject, path=path), id=f"{subject.name}-{path}")
            for subject in subjects
            for path in paths
        ],
    )


every = rows(SUBJECTS)
#: PEFT lets one copy of a module that is saved whole be active at a time.
headless = rows([subject for subject in SUBJECTS if not subject.saved_whole])
some = rows(SOME)
generators = rows([BY_NAME[name] for name in ("llama", "gpt2", "t5")])
of_transformers = rows(TRANSFORMERS)


# --- what the checks share ---


def output(model: nn.Module, inputs: Inputs, **options: Any) -> torch.Tensor:
    """Logits, or whatever the model gives in their place."""
    result = model(**inputs, **options)
    for name in ("logits", "last_hidden_state"):
        if hasattr(result, name):
            return getattr(result, name)
    return result


def mine(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of one adapter: its rows, and its copies of the modules that are saved whole."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(f".neft_rows.{adapter}") or f".modules_to_save.{adapter}." in name
    }


@torch.no_grad()
def move(model: nn.Module, adapter: str = "default", seed: int = 0) -> None:
    """Change an adapter's parameters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in mine(model, adapter).values():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def weights(model: nn.Module) -> State:
    """The base model's weights by their plain names, in an adapted model too."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in copy.deepcopy(model.state_dict()).items()
        if ".neft_" not in name and ".modules_to_save." not in name
    }


def trained_weights(subject: Subject, model: nn.Module, adapters: dict[str, int]) -> State:
    """The base's weights with the rows of `adapters` (name -> part) written into them, the plain way."""
    plain = subject.base()
    held = mine_by_module(model)
    for adapter, part in adapters.items():
        for name, chosen in subject.neurons(part).rows().items():
            write_rows(
                plain.get_submodule(name), chosen.side, torch.from_numpy(chosen.positions.copy()), held[name, adapter]
            )
    return weights(plain)


def mine_by_module(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, NeftLinear):
            for adapter, values in module.neft_rows.items():
                found[name.removeprefix("base_model.model."), adapter] = values.detach().clone()
    return found


def whole(subject: Subject, state: State) -> State:
    """Without the modules that are saved whole, which PEFT leaves as they were trained."""
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in subject.saved_whole}


def loss(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    result = output(model, inputs).float()
    # Unlike weights, since a final norm makes a plain sum, and a sum of squares, almost constant.
    return (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() / len(result)


def train(model: nn.Module, inputs: Inputs, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, inputs).backward()
        optimizer.step()


def gradients(model: nn.Module, inputs: Inputs) -> State:
    model.zero_grad()
    loss(model, inputs).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def assert_alike(subject: Subject, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Bit for bit in place, where the rows are in the weight; beside it they are summed in another order."""
    if subject.path == "inplace":
        assert torch.equal(actual, expected)
    else:
        assert_near(actual, expected, tolerance)


def same_adapters(first: PeftModel, second: PeftModel, adapter: str = "default") -> None:
    states = [get_peft_model_state_dict(model, adapter_name=adapter) for model in (first, second)]
    assert states[0]
    assert differing(*states) == []


# --- what a PEFT model is ---


@some
def test_attributes(subject: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    model = subject.adapted()
    assert all(callable(getattr(model, name)) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in mine(model).values())
    assert total == trainable + sum(p.numel() for p in subject.base().parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out
    assert model.active_adapters == ["default"]
    assert model.active_peft_config.peft_type.value == "NEFT"
    assert model.has_active_enabled_adapter
    assert type(model.get_base_model()) is type(subject.base())


@some
def test_an_adapter_has_the_name_it_was_given(subject: Subject) -> None:
    model = subject.adapted("mine")
    assert list(model.peft_config) == ["mine"]
    own = [name for name in model.state_dict() if ".neft_" in name or ".modules_to_save." in name]
    assert own
    assert all(".mine" in name and ".default" not in name for name in own)


@every
def test_only_the_adapter_is_trainable(subject: Subject) -> None:
    model = subject.adapted()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == mine(model).keys()
    assert sum(layer.neft_rows["default"].numel() for layer in layers(model)) == subject.neurons().parameters
    assert len(layers(model)) == len(subject.neurons().rows())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_computes_what_the_base_does(subject: Subject, dtype: torch.dtype) -> None:
    expected = subject.gives(subject.base(dtype))
    assert expected.isfinite().all()
    assert torch.equal(subject.gives(subject.adapted(moved=False, dtype=dtype)), expected)


@some
def test_the_layers_show_the_base_weight_and_bias(subject: Subject) -> None:
    model, plain = subject.adapted(), subject.base()
    for name in subject.neurons().rows():
        layer, base = model.get_base_model().get_submodule(name), plain.get_submodule(name)
        assert torch.equal(layer.weight, base.weight)
        assert (layer.bias is None) == (base.bias is None)
        assert base.bias is None or torch.equal(layer.bias, base.bias)
        assert "neft.NeftLinear" in repr(layer)
        assert repr(base) in repr(layer)
        assert "(default): Parameter" in repr(layer)


@some
def test_status(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    status = model.get_model_status()
    assert (status.peft_types, status.adapter_model_type) == ({"default": "NEFT", "other": "NEFT"}, "NeftModel")
    assert status.base_model_type == type(subject.base()).__name__
    assert status.num_adapter_layers == len(layers(model)) + len(subject.saved_whole)
    assert status.trainable_params == sum(p.numel() for p in mine(model).values())
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True, "other": False}
    assert status.available_adapters == ["default", "other"]
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    names = {layer.name for layer in model.get_layer_status() if layer.module_type == "neft.NeftLinear"}
    assert {name.removeprefix("model.") for name in names} == subject.neurons().rows().keys()


# --- training ---


@every
def test_gradients_are_the_chosen_ones_of_the_dense_weights(subject: Subject) -> None:
    model, plain = subject.adapted(), subject.base()
    plain.load_state_dict(trained_weights(subject, model, {"default": 0}), strict=False)
    # The heads that are saved whole would add nothing to this check.
    for name in subject.saved_whole:
        plain.get_submodule(name).load_state_dict(
            model.get_base_model().get_submodule(name).modules_to_save["default"].state_dict()
        )
    plain.requires_grad_(False)
    for name in subject.neurons().rows():
        plain.get_submodule(name).weight.requires_grad_(True)
    found, dense = gradients(model, subject.inputs), gradients(plain, subject.inputs)
    for name, chosen in subject.neurons().rows().items():
        dim = storage_dim(plain.get_submodule(name), chosen.side)
        picked = dense[f"{name}.weight"].index_select(dim, torch.from_numpy(chosen.positions.copy()))
        expected = picked if dim == 0 else picked.T
        largest = expected.abs().max()
        assert largest > 0
        assert_near(found[f"base_model.model.{name}.neft_rows.default"] / largest, expected / largest)


@every
def test_training_changes_the_adapter_alone(subject: Subject) -> None:
    model, expected = subject.adapted(moved=False), subject.gives(subject.base())
    before = {name: p.detach().clone() for name, p in mine(model).items()}
    train(model, subject.inputs)
    assert all((p != before[name]).any() for name, p in mine(model).items())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == before.keys()
    learnt = subject.gives(model)
    assert not torch.equal(learnt, expected)
    with model.disable_adapter():
        assert torch.equal(subject.gives(model), expected)
    assert torch.equal(subject.gives(model), learnt)
    assert differing(weights(model), weights(subject.base())) == []


@some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_rows_over_half_precision(subject: Subject, dtype: torch.dtype, autocast: bool) -> None:
    model = subject.adapted(dtype=dtype, autocast_adapter_dtype=autocast)
    model.add_adapter("other", subject.config(1), autocast_adapter_dtype=autocast)
    for adapter in ("default", "other"):
        assert {layer.neft_rows[adapter].dtype for layer in layers(model)} == {torch.float32 if autocast else dtype}
    expected = subject.gives(model)
    assert expected.dtype == dtype
    assert expected.isfinite().all()
    found = gradients(model, subject.inputs)
    assert {name: gradient.dtype for name, gradient in found.items()} == {n: p.dtype for n, p in mine(model).items()}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert_alike(subject, subject.gives(model.merge_and_unload(safe_merge=True)), expected, tolerance=0.1)


@of_transformers
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(subject: Subject, reentrant: bool) -> None:
    model, found = subject.adapted().train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(gradients(model, subject.inputs))
    assert found[0].keys() == found[1].keys() == mine(model).keys()
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient)


@of_transformers
def test_embeddings_can_be_passed_in_the_place_of_tokens(subject: Subject) -> None:
    model = subject.adapted()
    inputs = dict(subject.inputs)
    embed, tokens = model.get_input_embeddings(), inputs.pop("input_ids")
    assert not embed(tokens).requires_grad
    model.enable_input_require_grads()
    embeddings = embed(tokens)
    assert embeddings.requires_grad
    inputs["inputs_embeds"] = embeddings.detach().requires_grad_()
    found = output(model, inputs)
    found.float().square().mean().backward()
    assert inputs["inputs_embeds"].grad.abs().max() > 0
    if "llama_c" not in subject.name and "gpt2_c" not in subject.name:
        # Without ids, a decoder's classifier takes the last position, padded or not.
        assert torch.equal(found, subject.gives(model))


# --- disabling, merging, unloading ---


@some
def test_disabling_is_left_as_it_was_found(subject: Subject) -> None:
    model, base = subject.adapted(), subject.gives(subject.base())
    expected = subject.gives(model)
    model.base_model.disable_adapter_layers()
    with model.disable_adapter():
        assert torch.equal(subject.gives(model), base)
    assert torch.equal(subject.gives(model), base)
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(subject.gives(model), expected)
    assert model.get_model_status().enabled is True


@every
def test_merging_and_unmerging(subject: Subject) -> None:
    model, plain = subject.adapted(), weights(subject.base())
    expected = subject.gives(model)
    model.merge_adapter()
    merged = subject.gives(model)
    assert_alike(subject, merged, expected)
    assert differing(weights(model), trained_weights(subject, model, {"default": 0})) == []
    # PEFT counts the modules that are saved whole, which are never merged.
    assert model.get_model_status().merged_adapters == ("irregular" if subject.saved_whole else ["default"])
    with pytest.warns(UserWarning, match="nothing to do|All adapters are already merged"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(subject.gives(model), merged)
    model.unmerge_adapter()
    assert differing(weights(model), plain) == []
    assert torch.equal(subject.gives(model), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@some
@pytest.mark.parametrize("merged", [True, False])
def test_a_model_without_its_adapter(subject: Subject, merged: bool) -> None:
    model, plain = subject.adapted(), weights(subject.base())
    if merged:
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(subject.gives(model), subject.gives(subject.base()))
    expected, learnt = subject.gives(model), trained_weights(subject, model, {"default": 0})
    kept = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert not layers(kept)
    assert type(kept) is type(subject.base())
    assert_alike(subject, subject.gives(kept), expected)
    assert differing(whole(subject, weights(kept)), whole(subject, learnt)) == []
    assert bool(differing(weights(kept), whole(subject, learnt))) == bool(subject.saved_whole)
    left = model.unload()
    assert not layers(left)
    assert differing(whole(subject, weights(left)), whole(subject, plain)) == []
    if not subject.saved_whole:
        assert torch.equal(subject.gives(left), subject.gives(subject.base()))


@some
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged_safely(subject: Subject, value: float) -> None:
    model, plain = subject.adapted(), weights(subject.base())
    with torch.no_grad():
        layers(model)[0].neft_rows["default"][0, 0] = value
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert differing(weights(model), plain) == []
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


# --- several adapters ---


@headless
def test_disjoint_adapters_work_and_merge_together(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    alone = subject.gives(model)
    model.base_model.set_adapter(["default", "other"])
    both = subject.gives(model)
    assert not torch.equal(both, alone)
    learnt = trained_weights(subject, model, {"default": 0, "other": 1})
    model.merge_adapter()
    assert_alike(subject, subject.gives(model), both)
    assert differing(weights(model), learnt) == []
    model.unmerge_adapter()
    assert differing(weights(model), weights(subject.base())) == []
    model.set_adapter("default")
    assert torch.equal(subject.gives(model), alone)


@headless
def test_adapters_that_share_neurons_are_refused_together(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    model.add_adapter("same", subject.config(0))
    model.base_model.set_adapter(["default", "same"])
    for use in (subject.gives, lambda model: model.merge_adapter()):
        with pytest.raises(InputError, match="adapters 'default' and 'same' train the same weights"):
            use(model)
    assert differing(weights(model), weights(subject.base())) == []


@every
def test_the_adapter_that_is_set_is_active_and_trainable(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    expected = {"default": subject.gives(model), "base": subject.gives(subject.base())}
    model.set_adapter("other")
    expected["other"] = subject.gives(model)
    assert len({tuple(tensor.flatten().tolist()) for tensor in expected.values()}) == 3
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert model.active_adapter == name
        assert {n for n, p in model.named_parameters() if p.requires_grad} == mine(model, name).keys()
        assert torch.equal(subject.gives(model), expected[name])
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == mine(model, "default").keys()
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("unknown")


@some
def test_deleting_adapters(subject: Subject) -> None:
    model = subject.adapted("default", "inactive", "third")
    expected = subject.gives(model)
    model.delete_adapter("inactive")
    assert torch.equal(subject.gives(model), expected)
    assert list(model.peft_config) == ["default", "third"]
    assert not any("inactive" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("unknown")
    model.set_adapter("third")
    remaining = subject.gives(model)
    model.set_adapter("default")
    subject.gives(model)
    with pytest.warns(UserWarning, match="Setting active adapter to third"):
        model.delete_adapter("default")
    assert torch.equal(subject.gives(model), remaining)
    model.delete_adapter("third")
    assert "third" not in model.peft_config
    assert not mine(model, "third")
    # PEFT's own forward looks for an active config; the model under it is the base again.
    assert torch.equal(subject.gives(model.base_model.model), subject.gives(subject.base()))


@some
def test_a_merged_adapter_is_not_deleted(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    model.merge_adapter()
    expected = subject.gives(model)
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert torch.equal(subject.gives(model), expected)


@every
def test_each_example_can_have_an_adapter(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    expected = {"__base__": subject.gives(subject.base())}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = subject.gives(model)
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        found = output(model, subject.inputs, adapter_names=names)
    for place, name in enumerate(names):
        assert_near(found[place], expected[name][place])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        output(model, subject.inputs, adapter_names=names)
    model.eval()
    with pytest.raises(ValueError, match="unknown"):
        output(model, subject.inputs, adapter_names=["unknown"] * 4)
    with pytest.raises(ValueError, match="adapter_names"):
        output(model, subject.inputs, adapter_names=["default"] * 3)


@headless
def test_a_weighted_union_of_adapters(subject: Subject) -> None:
    model = subject.adapted("default", "other")
    model.base_model.set_adapter(["default", "other"])
    expected = subject.gives(model)
    model.set_adapter("default")
    model.base_model.add_weighted_adapter(["default", "other"], "both")
    model.base_model.add_weighted_adapter(["default"], "none", weights=[0.0])
    assert model.active_adapters == ["default"]
    model.set_adapter("both")
    assert_alike(subject, subject.gives(model), expected)
    model.set_adapter("none")
    assert_near(subject.gives(model), subject.gives(subject.base()))


# --- saving and loading ---


@some
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_saving_and_loading(subject: Subject, safe: bool, tmp_path: Path) -> None:
    model = subject.adapted()
    expected = subject.gives(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    file = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", file}
    trained = sum(p.numel() for p in mine(model).values())
    positions = sum(len(chosen.positions) for chosen in subject.neurons().rows().values())
    assert sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values()) == trained + positions
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path)
    same_adapters(loaded, model)
    assert differing(loaded.state_dict(), model.state_dict()) == []
    assert torch.equal(subject.gives(loaded), expected)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode
    assert type(loaded) is type(model)
    with loaded.disable_adapter():
        assert torch.equal(subject.gives(loaded), subject.gives(subject.base()))
    assert "library_name: peft" in (tmp_path / "README.md").read_text()


@some
def test_selected_adapters_are_saved_alone(subject: Subject, tmp_path: Path) -> None:
    """Names that hold another name are no matter."""
    model = subject.adapted("default", "default2", "other_default", "efaul")
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    same_adapters(PeftModel.from_pretrained(subject.base(), tmp_path / "one"), model)
    model.save_pretrained(tmp_path / "all")
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path / "all")
    for name in ("default2", "other_default", "efaul"):
        result = loaded.load_adapter(tmp_path / "all" / name, name)
        assert result.unexpected_keys == []
        same_adapters(loaded, model, name)
        for each in (loaded, model):
            each.set_adapter(name)
        assert torch.equal(subject.gives(loaded), subject.gives(model))
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["unknown"])


@some
def test_loading_with_the_config_at_hand(subject: Subject, tmp_path: Path) -> None:
    model = subject.adapted()
    model.save_pretrained(tmp_path)
    config = subject.config()
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path, config=config, is_trainable=False)
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert torch.equal(subject.gives(loaded), subject.gives(model))


@some
def test_loading_with_little_memory(subject: Subject, tmp_path: Path) -> None:
    model = subject.adapted()
    expected = subject.gives(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path, low_cpu_mem_usage=True)
    result = loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cpu"}
    for name in ("default", "again"):
        loaded.set_adapter(name)
        assert torch.equal(subject.gives(loaded), expected)
    again = get_peft_model(subject.base(), subject.config(), low_cpu_mem_usage=True)
    assert {layer.neft_rows["default"].device.type for layer in layers(again)} == {"meta"}
    set_peft_model_state_dict(again, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert torch.equal(subject.gives(again.eval()), expected)


@some
def test_training_goes_on_after_loading(subject: Subject, tmp_path: Path) -> None:
    model = subject.adapted()
    train(model, subject.inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path, is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == mine(model).keys()
    for each in (model, loaded):
        train(each.eval(), subject.inputs)
    same_adapters(loaded, model)
    assert torch.equal(subject.gives(loaded), subject.gives(model))


@some
def test_states_are_handed_from_model_to_model(subject: Subject) -> None:
    model = subject.adapted()
    expected = subject.gives(model)
    held = get_peft_model_state_dict(model)
    assert all(".default" not in name for name in held)
    buffer = io.BytesIO()
    torch.save(held, buffer)
    buffer.seek(0)
    other = subject.adapted(moved=False)
    result = set_peft_model_state_dict(other, torch.load(buffer))
    assert result.unexpected_keys == []
    assert not [name for name in result.missing_keys if ".neft_" in name or ".modules_to_save." in name]
    assert torch.equal(subject.gives(other), expected)
    third = subject.adapted(moved=False)
    third.load_state_dict(model.state_dict())
    assert torch.equal(subject.gives(third), expected)
    assert peft.get_base_model_state_dict(model).keys() == subject.base().state_dict().keys()
    assert differing(peft.get_base_model_state_dict(model), subject.base().state_dict()) == []


@some
def test_an_adapter_is_injected(subject: Subject) -> None:
    model = subject.adapted()
    injected = inject_adapter_in_model(subject.config(), subject.base()).eval()
    assert type(injected) is type(subject.base())
    assert torch.equal(subject.gives(injected), subject.gives(subject.base()))
    held = {name.removeprefix("base_model.model."): each for name, each in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(injected, held)
    assert torch.equal(subject.gives(injected), subject.gives(model))
    assert differing(get_peft_model_state_dict(injected), held) == []


@some
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_its_own(subject: Subject, copied: Callable[[Any], Any]) -> None:
    model = subject.adapted()
    expected = subject.gives(model)
    other = copied(model)
    assert torch.equal(subject.gives(other), expected)
    move(other, seed=5)
    assert not torch.equal(subject.gives(other), expected)
    assert torch.equal(subject.gives(model), expected)
    assert differing(weights(other), weights(subject.base())) == []


@some
@pytest.mark.parametrize("moved", [lambda m: m.to("cpu"), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_model_in_use_is_moved(subject: Subject, moved: Callable[[Any], Any]) -> None:
    model = subject.adapted()
    subject.gives(model)
    moved(model)
    plain = moved(subject.base())
    assert differing(weights(model), weights(plain)) == []
    with model.disable_adapter():
        assert torch.equal(subject.gives(model), subject.gives(plain))
    assert subject.gives(model).isfinite().all()


# --- generating ---

GENERATION = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def prompts(subject: Subject) -> Inputs:
    return {name: subject.inputs[name] for name in ("input_ids", "attention_mask")}


@rows(GENERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generating(subject: Subject, dtype: torch.dtype) -> None:
    model, plain = subject.adapted(dtype=dtype), subject.base(dtype)
    options = {**prompts(subject), **GENERATION}
    found = model.generate(**options)
    with model.disable_adapter():
        assert torch.equal(model.generate(**options), plain.generate(**options))
    assert torch.equal(model.generate(**options), found)
    if subject.path == "inplace" or dtype == torch.float32:
        # In half precision, the rounding of the side path may choose another of two near tokens.
        assert torch.equal(model.merge_and_unload().generate(**options), found)


@generators
def test_generating_from_an_argument_without_name(subject: Subject) -> None:
    model, tokens = subject.adapted(), subject.inputs["input_ids"]
    if subject.task_type == TaskType.SEQ_2_SEQ_LM:
        # PEFT's class of such models takes named arguments alone.
        with pytest.raises(TypeError):
            model.generate(tokens, **GENERATION)
    else:
        assert torch.equal(model.generate(tokens, **GENERATION), model.generate(input_ids=tokens, **GENERATION))


@generators
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_an_adapter_for_each_example(subject: Subject, beams: int) -> None:
    model = subject.adapted("default", "other")
    options = {**GENERATION, **prompts(subject), "num_beams": beams}
    expected = {"__base__": subject.base().generate(**options)}
    for name in ("other", "default"):
        model.set_adapter(name)
        expected[name] = model.generate(**options)
    names = ["other", "__base__", "default", "other"]
    found = model.generate(**options, adapter_names=names)
    for place, name in enumerate(names):
        assert torch.equal(found[place], expected[name][place])
    assert any((expected[name] != expected["__base__"]).any() for name in ("default", "other"))


# --- loading by name ---


def saved_with_base(subject: Subject, folder: Path) -> PeftModel:
    """An adapted model, saved to `folder / "adapter"`, whose config names the base in `folder / "base"`."""
    subject.base().save_pretrained(folder / "base")
    model = get_peft_model(type(subject.base()).from_pretrained(folder / "base"), subject.config()).eval()
    move(model)
    model.save_pretrained(folder / "adapter")
    return model


@rows([BY_NAME[name] for name in ("llama", "t5", "bert_classifier", "bert_features")])
def test_the_base_is_found_from_the_adapter(subject: Subject, tmp_path: Path) -> None:
    model = saved_with_base(subject, tmp_path)
    auto = {
        TaskType.CAUSAL_LM: peft.AutoPeftModelForCausalLM,
        TaskType.SEQ_2_SEQ_LM: peft.AutoPeftModelForSeq2SeqLM,
        TaskType.SEQ_CLS: peft.AutoPeftModelForSequenceClassification,
        TaskType.FEATURE_EXTRACTION: peft.AutoPeftModelForFeatureExtraction,
    }
    loaded = auto[subject.task_type].from_pretrained(tmp_path / "adapter")
    assert_near(subject.gives(loaded.eval()), subject.gives(model))
    same_adapters(loaded, model)
    with pytest.raises(ValueError, match="use a specific class"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")


@rows([BY_NAME["llama"], BY_NAME["t5"]])
def test_a_device_map(subject: Subject, tmp_path: Path) -> None:
    model = saved_with_base(subject, tmp_path)
    plain = type(subject.base()).from_pretrained(tmp_path / "base", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter", device_map={"": "cpu"})
    assert_near(subject.gives(loaded), subject.gives(model))


FRESH = """
import sys, torch
import neft
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/adapter").eval()
saved = torch.load(sys.argv[1] + "/expected.pt")
torch.testing.assert_close(model(**saved["inputs"]).logits.detach(), saved["logits"])
"""


def test_a_fresh_process_that_has_imported_neft_alone_loads_an_adapter(tmp_path: Path) -> None:
    subject = BY_NAME["llama"]
    model = saved_with_base(subject, tmp_path)
    torch.save({"inputs": subject.inputs, "logits": subject.gives(model)}, tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


# --- the config ---


@some
def test_a_config_goes_to_json_and_back(subject: Subject, tmp_path: Path) -> None:
    config = subject.config(inference_mode=True, revision="abc")
    config.save_pretrained(tmp_path)
    for loaded in (NeftConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path), copy.deepcopy(config)):
        assert type(loaded) is NeftConfig
        assert (loaded.rows, loaded.columns, loaded.space) == (config.rows, config.columns, config.space)
        assert (loaded.path, loaded.task_type, loaded.modules_to_save) == (
            config.path,
            config.task_type,
            config.modules_to_save,
        )
        assert set(loaded.target_modules) == set(config.target_modules)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["path"]) == ("NEFT", subject.path)
    assert "positions" not in written


def test_a_config_with_fields_of_the_future_warns(tmp_path: Path) -> None:
    BY_NAME["mlp"].config().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unheard_of": 1}))
    with pytest.warns(UserWarning, match="unheard_of"):
        assert type(PeftConfig.from_pretrained(tmp_path)) is NeftConfig


def test_an_adapter_of_the_other_path_is_refused() -> None:
    model = BY_NAME["mlp"].adapted()
    with pytest.raises(InputError, match="give all adapters of a model the same path"):
        model.add_adapter("other", BY_NAME["mlp"].config(path="side"))


def test_an_adapter_loaded_onto_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    BY_NAME["nested"].adapted().save_pretrained(tmp_path)
    other = BY_NAME["nested"].base()
    other.blocks[0].mlp["up"] = nn.Linear(12, 16)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)


# --- what does not apply ---


def unheld(module: nn.Module) -> Callable[[], Any]:
    """An adapter of rows of a module that computes none."""
    return lambda: get_peft_model(nn.ModuleDict({"module": module}), NeftConfig(rows={"module": 1}))


def both_heads() -> None:
    model = BY_NAME["nested_head_saved"].adapted("default", "other")
    model.base_model.set_adapter(["default", "other"])


#: What is tried -> the trial, and the error that says no.
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "hotswap": (
        lambda: check_hotswap_configs_compatible(BY_NAME["mlp"].config(), BY_NAME["mlp"].config()),
        ValueError,
        "Hotswapping only supports",
    ),
    "mixed adapter types": (
        lambda: get_peft_model(BY_NAME["mlp"].base(), BY_NAME["mlp"].config(), mixed=True),
        ValueError,
        "Compatible types",
    ),
    "excluded modules": (lambda: NeftConfig(exclude_modules=["lin0"]), TypeError, "unexpected keyword"),
    "biases": (lambda: NeftConfig(bias="all"), TypeError, "unexpected keyword"),
    "bare parameters": (lambda: NeftConfig(target_parameters=["weight"]), TypeError, "unexpected keyword"),
    "tokens": (lambda: NeftConfig(trainable_token_indices=[0]), TypeError, "unexpected keyword"),
    "convolutions": (unheld(nn.Conv2d(2, 3, 2)), InputError, "has no weight matrix"),
    "multi-head attention": (unheld(nn.MultiheadAttention(8, 2)), InputError, "has no weight matrix"),
    "norms": (unheld(nn.LayerNorm(4)), InputError, "has no weight matrix"),
    "scaling": (
        lambda: peft.helpers.rescale_adapter_scale(BY_NAME["mlp"].adapted(), 0.5).__enter__(),
        ValueError,
        "LoraLayer",
    ),
    "several heads": (both_heads, ValueError, "Only one adapter can be set"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_is_refused(name: str) -> None:
    attempt, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        attempt()


def test_rows_of_an_embedding_are_refused() -> None:
    with pytest.raises(InputError):
        unheld(nn.Embedding(4, 3))()


def test_neft_is_not_converted_to_lora() -> None:
    assert not BY_NAME["mlp"].adapted().supports_lora_conversion()


def test_what_does_not_apply_has_a_reason() -> None:
    assert all(len(reason.split()) > 3 for reason in NOT_APPLICABLE.values())
