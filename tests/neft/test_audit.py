"""The audit notices one flipped bit anywhere outside a neuron set, and nothing inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from neft import NeuronSet, NeuronSpace, Overlay
from neft.audit import Audit, WeightAudit, base_fingerprint, digests_around, state_digest, trained_weights
from neft.neurons import KINDS, Kind
from tests.neft.helpers import draw, state
from tests.tiny import FAMILIES, tiny_model


@torch.no_grad()
def flip(tensor: torch.Tensor, *place: int) -> None:
    """Flip the lowest bit of one element, in place."""
    whole = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    tensor.view(whole)[place] ^= 1


def chosen(model: Any, family: str) -> NeuronSet:
    """Neurons 3 and 5 of the first feed-forward site."""
    space = NeuronSpace.from_model(model)
    return NeuronSet(space, {space.sites[0].name: [3, 5]})


#: Family, weight, element: one outside the set {3, 5} of the first feed-forward block.
OUTSIDE = [
    ("llama", "model.norm.weight", (0,)),
    ("llama", "model.layers.0.input_layernorm.weight", (31,)),
    ("llama", "model.embed_tokens.weight", (4, 7)),
    ("llama", "lm_head.weight", (0, 0)),
    ("llama", "model.layers.0.mlp.up_proj.weight", (4, 0)),
    ("llama", "model.layers.0.mlp.gate_proj.weight", (2, 31)),
    ("llama", "model.layers.0.mlp.down_proj.weight", (3, 6)),
    ("llama", "model.layers.0.self_attn.v_proj.weight", (3, 3)),
    ("llama", "model.layers.1.mlp.up_proj.weight", (3, 0)),
    ("qwen2", "model.layers.0.self_attn.q_proj.bias", (0,)),
    ("opt", "model.decoder.layers.0.fc1.bias", (3,)),
    ("gpt2", "transformer.h.0.mlp.c_fc.bias", (5,)),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight", (3, 4)),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", (4, 3)),
    ("gpt2", "transformer.wte.weight", (0, 0)),
    ("bert", "bert.encoder.layer.0.output.LayerNorm.bias", (1,)),
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (0, 0)),
]
#: The same for elements that the set owns.
INSIDE = [
    ("llama", "model.layers.0.mlp.up_proj.weight", (3, 0)),
    ("llama", "model.layers.0.mlp.gate_proj.weight", (5, 31)),
    ("llama", "model.layers.0.mlp.down_proj.weight", (4, 5)),
    ("gpt2", "transformer.h.0.mlp.c_fc.weight", (31, 5)),
    ("gpt2", "transformer.h.0.mlp.c_proj.weight", (3, 0)),
    ("opt", "model.decoder.layers.0.fc1.weight", (3, 1)),
    ("opt", "model.decoder.layers.0.fc2.weight", (1, 3)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "name", "place"), OUTSIDE)
def test_one_flipped_bit_outside_the_set_is_found_and_named(
    family: str, name: str, place: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = tiny_model(family).to(dtype)
    audit, digest = Audit(model, chosen(model, family)), state_digest(model)
    assert audit.compare(model).identical
    flip(model.get_parameter(name), *place)
    result = audit.compare(model)
    assert not result.identical
    assert len(result.changed) == 1
    assert model.get_parameter(result.changed[0]) is model.get_parameter(name)
    assert state_digest(model) != digest
    flip(model.get_parameter(name), *place)
    assert audit.compare(model).identical
    assert state_digest(model) == digest


@pytest.mark.parametrize(("family", "name", "place"), INSIDE)
def test_what_changes_inside_the_set_is_no_complaint(family: str, name: str, place: tuple[int, ...]) -> None:
    model = tiny_model(family)
    audit, digest = Audit(model, chosen(model, family)), state_digest(model)
    flip(model.get_parameter(name), *place)
    result = audit.compare(model)
    assert result.identical
    assert result.changed == ()
    assert state_digest(model) != digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_set_passes_and_a_smaller_one_does_not(family: str, kind: Kind) -> None:
    model = tiny_model(family)
    space = NeuronSpace.from_model(model, [kind])
    neurons = draw(space)
    site = space.sites[-1].name
    smaller = neurons - NeuronSet(space, {site: neurons[site][:1]})
    audits = Audit(model, neurons), Audit(model, smaller)
    values = Overlay.read(model, neurons).values
    Overlay(neurons, {name: rows + 1 for name, rows in values.items()}).lay_on(model)
    whole, partial = (audit.compare(model) for audit in audits)
    assert whole.identical
    assert set(partial.changed) == {f"{part.module}.weight" for part in space.site(site).parts}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_either_audited_or_in_the_set(family: str) -> None:
    model = tiny_model(family)
    neurons = draw(NeuronSpace.from_model(model, ["ffn", "attention"]))
    result = Audit(model, neurons).compare(model)
    persistent = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    assert result.parameters_outside + neurons.parameters == sum(persistent.values())
    assert result.tensors == len(persistent)
    assert result.to_dict() == {
        "identical": True,
        "tensors": len(persistent),
        "parameters_outside": result.parameters_outside,
        "changed": [],
    }


def test_a_negative_zero_is_a_change() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = 0.0
        audit = Audit(model, chosen(model, "llama"))
        model.model.norm.weight[0] = -0.0
    assert audit.compare(model).changed == ("model.norm.weight",)


@pytest.mark.parametrize("change", ["added", "removed", "retyped"])
def test_weights_that_come_go_or_change_type_are_found(change: str) -> None:
    model = tiny_model()
    audit = Audit(model, chosen(model, "llama"))
    if change == "added":
        model.model.norm.bias = nn.Parameter(torch.zeros(2))
    elif change == "removed":
        del model.model.norm.weight
    else:
        model.model.norm.to(torch.bfloat16)
    (name,) = audit.compare(model).changed
    assert name.startswith("model.norm.")


def test_an_audit_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    before, versions = state(model), [parameter._version for parameter in model.parameters()]
    Audit(model, chosen(model, "llama")).compare(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())
    assert [parameter._version for parameter in model.parameters()] == versions


def test_tied_weights_are_one() -> None:
    model = tiny_model("gpt2")
    audit = Audit(model, chosen(model, "gpt2"))
    flip(model.transformer.wte.weight, 0, 0)
    assert len(audit.compare(model).changed) == 1


def test_the_identity_of_a_base_is_its_weights_and_config(tmp_path: Any) -> None:
    model = tiny_model()
    identity = base_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert base_fingerprint(type(model).from_pretrained(tmp_path)) == identity
    assert base_fingerprint(tiny_model()) == identity
    assert base_fingerprint(tiny_model(seed=1)) != identity
    model.config.use_cache = not model.config.use_cache
    assert base_fingerprint(model) == identity
    model.config.rms_norm_eps *= 2
    assert base_fingerprint(model) != identity


def test_one_flipped_bit_of_a_weight_that_is_not_trained_is_noticed() -> None:
    model = tiny_model("gpt2").requires_grad_(False)
    # Tied to the head, whose name comes first in the audit.
    model.transformer.wte.weight.requires_grad_(True)
    trained, audit = trained_weights(model), WeightAudit(model)
    assert trained == {"transformer.wte.weight", "lm_head.weight"}
    flip(model.lm_head.weight, 0, 0)
    assert audit.compare(model, trained).identical
    flip(model.transformer.h[0].mlp.c_fc.bias, 5)
    found = audit.compare(model, trained)
    assert not found.identical and found.changed == ("transformer.h.0.mlp.c_fc.bias",)
    unique = sum(weight.numel() for weight in model.parameters())
    assert found.parameters_outside == unique - model.lm_head.weight.numel()


def test_digests_around_a_change_are_those_before_and_after_it() -> None:
    model = tiny_model()
    before = state_digest(model)

    def change() -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3] += 1

    found = digests_around(model, {"model.layers.1.mlp.down_proj.weight": change})
    assert found == (before, state_digest(model))
    assert found[0] != found[1]


def test_digests_around_a_change_of_a_weight_of_two_names() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = state_digest(model)

    def change() -> None:
        with torch.no_grad():
            model.model.embed_tokens.weight[3] += 1

    assert digests_around(model, {"model.embed_tokens.weight": change}) == (before, state_digest(model))
    assert state_digest(model) != before


def test_a_change_that_fails_ends_the_digests() -> None:
    def change() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        digests_around(tiny_model(), {"model.layers.0.mlp.up_proj.weight": change})
