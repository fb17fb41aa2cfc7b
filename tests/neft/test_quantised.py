"""The side path over weights that are quantised by torchao or bitsandbytes, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from neft import InputError, NeftConfig, NeuronSet, NeuronSpace
from neft.neurons import KINDS
from neft.overlay import dense_weight
from neft.tuner import NeftLinear
from tests.neft.helpers import Inputs, differing, draw, gradients, jitter, layers, logits, train
from tests.neft.test_tuner import assert_close, masked_gradients
from tests.tiny import batch, tiny_model

NEEDED = "not installed: quantised bases are NOT TESTED here; run `make test-quantised`"


def torchao(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def quantise(linear: nn.Linear) -> nn.Module:
        pytest.importorskip("torchao", reason=f"torchao is {NEEDED}")
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        quantize_(linear, Int8WeightOnlyConfig() if bits == 8 else four)
        return linear

    return quantise


def bitsandbytes(bits: int, kind: str = "nf4") -> Callable[[nn.Linear], nn.Module]:
    def quantise(linear: nn.Linear) -> nn.Module:
        bnb = pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is {NEEDED}")
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        made = (
            bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
            if bits == 8
            else bnb.nn.Linear4bit(*shape, quant_type=kind, compute_dtype=linear.weight.dtype)
        )
        made.load_state_dict(linear.state_dict())
        # Moving it to a device is what quantises it.
        return made.to("cpu").requires_grad_(False)

    return quantise


SCHEMES = {
    "torchao int8": torchao(8),
    "torchao int4": torchao(4),
    "bitsandbytes int8": bitsandbytes(8),
    "bitsandbytes nf4": bitsandbytes(4),
    "bitsandbytes fp4": bitsandbytes(4, "fp4"),
}
schemes = pytest.mark.parametrize("scheme", SCHEMES)
#: With and without biases.
families = pytest.mark.parametrize("family", ["llama", "gpt_neox"])


def quantised(scheme: str, family: str = "llama") -> Any:
    """A tiny model whose layers' matrices are quantised, and its head is not, as is usual."""
    model = tiny_model(family)
    for name, module in list(model.named_modules()):
        # Queries and keys have no neurons of these kinds, and bitsandbytes cannot run ones so narrow in inference.
        if isinstance(module, nn.Linear) and ".layers." in f".{name}" and not name.endswith(("q_proj", "k_proj")):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SCHEMES[scheme](module))
    return model


@torch.no_grad()
def dequantised(model: nn.Module, family: str = "llama") -> Any:
    """A plain model of the values that a quantised one stands for."""
    plain = tiny_model(family)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(
                dense_weight(getattr(model.get_submodule(name), "base_layer", model.get_submodule(name)))
            )
    return plain


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the quantised weights are made of, by the names of their modules in the plain model."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or type(weight) is nn.Parameter:
            continue
        parts = {"data": weight.data} if not hasattr(weight, "__tensor_flatten__") else {}
        if not parts:
            parts = {part: getattr(weight, part) for part in weight.__tensor_flatten__()[0]}
        for holder in (weight, getattr(module, "state", None), getattr(weight, "quant_state", None)):
            for part in ("SCB", "absmax"):
                if isinstance(getattr(holder, part, None), torch.Tensor):
                    parts[part] = getattr(holder, part)
        plain_name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        found |= {f"{plain_name}.{part}": tensor.detach().clone() for part, tensor in parts.items()}
    assert found
    return found


def adapted(scheme: str, family: str = "llama") -> tuple[PeftModel, NeuronSet, Inputs]:
    model = quantised(scheme, family)
    neurons = draw(NeuronSpace.from_model(model, ["ffn", "attention"]))
    # In evaluation mode, 8-bit layers of bitsandbytes round their inputs too; there is no dropout here.
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, path="side")).train()
    return peft_model, neurons, batch(model)


@schemes
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_has_the_neurons_of_the_plain_one(scheme: str, kind: Any) -> None:
    plain, model = tiny_model(), quantised(scheme)
    expected = NeuronSpace.from_model(plain, [kind])
    assert NeuronSpace.from_model(model, [kind]).fingerprint == expected.fingerprint
    assert expected.model_parameters == sum(parameter.numel() for parameter in plain.parameters())
    config = NeftConfig.from_neurons(draw(expected), path="side")
    assert NeuronSpace.from_model(get_peft_model(model, config), [kind]).fingerprint == expected.fingerprint


@schemes
@families
def test_an_adapter_computes_and_trains_over_the_values_that_the_weights_stand_for(scheme: str, family: str) -> None:
    peft_model, neurons, inputs = adapted(scheme, family)
    plain = dequantised(peft_model.get_base_model(), family)
    base = logits(plain, inputs)
    assert (logits(tiny_model(family), inputs) - base).abs().max() > 1e-3
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits(peft_model, inputs), base, rtol=1e-4, atol=1e-4)
    # Rows that are not trained yet change nothing, bit for bit.
    with peft_model.disable_adapter():
        expected = logits(peft_model, inputs)
    assert torch.equal(logits(peft_model, inputs), expected)
    jitter(peft_model)
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert (logits(plain, inputs) - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(peft_model, inputs), logits(plain, inputs), rtol=1e-4, atol=1e-4)
    assert_close(gradients(peft_model, inputs), masked_gradients(plain, neurons, inputs), tolerance=1e-4)


@schemes
def test_training_changes_the_rows_and_not_a_byte_of_the_base(scheme: str) -> None:
    peft_model, neurons, inputs = adapted(scheme)
    before, rows = stored(quantised(scheme)), dict(peft_model.base_model.overlay(neurons).values)
    trainable = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in peft_model.named_parameters() if ".neft_rows." in name}
    losses = [peft_model(**inputs).loss.item()]
    train(peft_model, inputs, steps=5)
    losses.append(peft_model(**inputs).loss.item())
    assert losses[1] < losses[0]
    after = peft_model.base_model.overlay(neurons).values
    assert all((after[name] != values).any() for name, values in rows.items())
    assert differing(stored(peft_model), before) == []
    base = peft_model.unload()
    assert not layers(base)
    assert differing(stored(base), before) == []


@schemes
def test_an_overlay_of_a_quantised_model_can_be_laid_on_the_plain_one(scheme: str) -> None:
    peft_model, neurons, inputs = adapted(scheme)
    train(peft_model, inputs)
    overlay = peft_model.base_model.overlay(neurons)
    plain = tiny_model()
    base = logits(plain, inputs)
    before = overlay.lay_on(plain)
    assert not torch.equal(logits(plain, inputs), base)
    for name, rows in overlay.values.items():
        module = peft_model.get_base_model().get_submodule(name)
        assert isinstance(module, NeftLinear)
        assert torch.equal(rows, module.neft_rows["default"])
    before.lay_on(plain)
    assert torch.equal(logits(plain, inputs), base)


@schemes
def test_rows_cannot_be_written_into_quantised_weights(scheme: str) -> None:
    model = quantised(scheme)
    neurons = draw(NeuronSpace.from_model(model))
    message = r"rows cannot be written into a weight stored as \w+; leave them beside it with .*path='side'"
    before = stored(model)
    with pytest.raises(InputError, match=message):
        get_peft_model(model, NeftConfig.from_neurons(neurons))
    assert differing(stored(model), before) == []
    peft_model, *_, inputs = adapted(scheme)
    jitter(peft_model)
    expected = logits(peft_model, inputs)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(InputError, match=message):
            merge()
    assert torch.equal(logits(peft_model, inputs), expected)


@schemes
def test_adapters_are_saved_loaded_mixed_and_united_over_a_quantised_base(scheme: str, tmp_path: Path) -> None:
    peft_model, neurons, inputs = adapted(scheme)
    jitter(peft_model.eval())
    expected = logits(peft_model, inputs)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(scheme), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    with loaded.disable_adapter():
        base = logits(loaded, inputs)
    with torch.no_grad():
        mixed = loaded(**inputs, adapter_names=["__base__", "default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[1::2], expected[1::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[::2], base[::2], rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    other = draw(neurons.space, seed=4) - neurons
    loaded.add_adapter("other", NeftConfig.from_neurons(other, path="side"))
    loaded.base_model.add_weighted_adapter(["default", "other"], "united")
    loaded.set_adapter("united")
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-4, atol=1e-5)


def test_inference_does_not_pack_weights_so_that_rows_are_lost() -> None:
    """As 4-bit layers of bitsandbytes do on processors with bfloat16 instructions, in evaluation mode."""
    pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is {NEEDED}")
    peft_model, neurons, inputs = adapted("bitsandbytes nf4")
    before = stored(peft_model)
    jitter(peft_model)
    expected = logits(peft_model, inputs)
    torch.testing.assert_close(logits(peft_model.eval(), inputs), expected, rtol=1e-4, atol=1e-4)
    assert differing(stored(peft_model), before) == []
    packed = quantised("bitsandbytes nf4")
    packed.get_submodule(next(iter(neurons.rows()))).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match=r"packed the weights for inference on the CPU.*add the adapter before"):
        get_peft_model(packed, NeftConfig.from_neurons(neurons, path="side"))
