"""NEFT as a PEFT method: masked gradients, compact state, and a base that comes back bit for bit, whatever is done."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification

from neft import InputError, NeftConfig, NeuronSet, NeuronSpace, Overlay
from neft.audit import Audit
from neft.neurons import KINDS, Kind
from neft.overlay import storage_dim
from neft.tuner import NeftLinear
from tests.neft.helpers import (
    Inputs,
    adapted,
    collect,
    differing,
    draw,
    gradients,
    held,
    jitter,
    layers,
    logits,
    moved_base,
    split,
    state,
    train,
)
from tests.tiny import FAMILIES, batch, tiny_model

ROOT = Path(__file__).parents[2]
families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", KINDS)
#: One family of each way to store weights: plain, Conv1D, fused per head, encoder and decoder.
some_families = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5"])


def masked_gradients(model: nn.Module, neurons: NeuronSet, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The chosen rows of the dense gradients that a plain model's backward gives.

    The other weights are frozen, as PEFT freezes them, since attention takes another kernel where a bias is trained.
    """
    model.requires_grad_(False)
    for name in neurons.rows():
        model.get_submodule(name).weight.requires_grad_(True)
    model(**inputs).loss.backward()
    found = {}
    for name, rows in neurons.rows().items():
        module = model.get_submodule(name)
        dim = storage_dim(module, rows.side)
        picked = module.weight.grad.index_select(dim, torch.from_numpy(rows.positions.copy()))
        found[name] = picked if dim == 0 else picked.T
    return found


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(actual[name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item())


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert differing(actual, expected) == []


# --- gradients ---


@families
@kinds
def test_gradients_are_the_masked_gradients_of_a_full_backward(family: str, kind: Kind) -> None:
    peft_model, neurons, inputs = adapted(family, kind)
    plain = tiny_model(family)
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert_close(gradients(peft_model, inputs), masked_gradients(plain, neurons, inputs))


@families
@kinds
def test_nothing_but_the_chosen_rows_is_trained(family: str, kind: Kind) -> None:
    peft_model, neurons, inputs = adapted(family, kind)
    before = state(tiny_model(family))
    trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == neurons.parameters
    assert peft_model.get_nb_trainable_parameters()[0] == neurons.parameters
    optimizer = train(peft_model, inputs)
    assert {name for name, p in peft_model.named_parameters() if p.grad is not None} == trainable.keys()
    moments = [value for entry in optimizer.state.values() for value in entry.values() if value.ndim]
    assert sum(value.numel() for value in moments) == 2 * neurons.parameters
    learnt = peft_model.base_model.overlay(neurons)
    base = peft_model.unload()
    assert differing(before, state(base)) == []
    assert any(
        (rows != there).any()
        for rows, there in zip(learnt.values.values(), Overlay.read(base, neurons).values.values(), strict=True)
    )


@families
def test_several_kinds_train_together(family: str) -> None:
    kinds: tuple[Kind, ...] = ("ffn_in", "ffn_out", "attention", "qk")
    peft_model, neurons, inputs = adapted(family, *kinds)
    plain = tiny_model(family)
    audit = Audit(plain, neurons)
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert_close(gradients(peft_model, inputs), masked_gradients(plain, neurons, inputs))
    train(peft_model, inputs)
    assert audit.compare(peft_model.merge_and_unload()).identical


def test_gradients_add_up_over_micro_batches() -> None:
    peft_model, _, inputs = adapted()
    expected = {name: 2 * gradient for name, gradient in gradients(peft_model, inputs).items()}
    peft_model(**inputs).loss.backward()
    assert_same(gradients(peft_model, inputs), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    peft_model, _, inputs = adapted(family, "ffn", "attention", train=True)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.enable_input_require_grads()
            peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(gradients(peft_model, inputs))
    # Tied embeddings and shared position biases add up in another order, in the plain models too.
    assert_close(*found, tolerance=1e-6)


def test_second_derivatives_are_refused() -> None:
    """A gradient through the laid rows would be wrong without a word."""
    peft_model, _, inputs = adapted()
    rows = [layer.neft_rows["default"] for layer in layers(peft_model)]
    first = torch.autograd.grad(peft_model(**inputs).loss, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.pow(2).sum() for gradient in first).backward()


def test_a_frozen_adapter_passes_gradients_on_to_inputs() -> None:
    peft_model, _, inputs = adapted()
    found = []
    for trainable in (True, False):
        peft_model.requires_grad_(False)
        for layer in layers(peft_model):
            layer.neft_rows["default"].requires_grad_(trainable)
        embeddings = peft_model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        peft_model(inputs_embeds=embeddings, labels=inputs["labels"]).loss.backward()
        found.append(embeddings.grad)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)
    peft_model.zero_grad()


# --- interleaved forwards ---


def test_a_reference_pass_between_forward_and_backward_changes_nothing() -> None:
    peft_model, _, inputs = adapted()
    expected, reference = gradients(peft_model, inputs), logits(tiny_model(), inputs)
    loss = peft_model(**inputs).loss
    with torch.no_grad(), peft_model.disable_adapter():
        assert torch.equal(peft_model(**inputs).logits, reference)
    loss.backward()
    assert_same(collect(peft_model), expected)
    assert torch.equal(logits(peft_model.unload(), inputs), reference)


def test_backward_inside_disable_adapter_leaves_the_base_in_place() -> None:
    peft_model, _, inputs = adapted()
    base = state(tiny_model())
    loss = peft_model(**inputs).loss
    with peft_model.disable_adapter():
        loss.backward()
        assert differing(held(peft_model), base) == []


def two_adapters(family: str = "llama", *, disjoint: bool = True) -> tuple[PeftModel, NeuronSet, NeuronSet, Inputs]:
    """Adapters `default` and `other`, both moved; `default` is active."""
    model = tiny_model(family)
    space = NeuronSpace.from_model(model, ["ffn", "attention"])
    first, second = split(space) if disjoint else (draw(space, each=9, seed=1), draw(space, each=9, seed=2))
    peft_model = get_peft_model(model, NeftConfig.from_neurons(first))
    peft_model.add_adapter("other", NeftConfig.from_neurons(second))
    jitter(peft_model, "default", seed=1)
    jitter(peft_model, "other", seed=2)
    return peft_model.eval(), first, second, batch(model)


@some_families
@pytest.mark.parametrize("disjoint", [True, False])
def test_backward_after_switching_adapters_gives_each_its_own_gradient(family: str, disjoint: bool) -> None:
    peft_model, _, _, inputs = two_adapters(family, disjoint=disjoint)
    expected = {}
    for name in ("default", "other"):
        peft_model.set_adapter(name)
        expected[name] = gradients(peft_model, inputs, name)
    peft_model.set_adapter("default")
    first = peft_model(**inputs).loss
    peft_model.set_adapter("other")
    second = peft_model(**inputs).loss
    second.backward()
    assert_same(collect(peft_model, "other"), expected["other"])
    peft_model.zero_grad()
    peft_model.set_adapter("default")
    first.backward()
    assert_same(collect(peft_model, "default"), expected["default"])


def test_backward_of_one_adapter_leaves_the_other_laid() -> None:
    peft_model, *_, inputs = two_adapters()
    loss = peft_model(**inputs).loss
    peft_model.set_adapter("other")
    expected = logits(peft_model, inputs)
    before = held(peft_model)
    loss.backward()
    assert differing(held(peft_model), before) == []
    assert torch.equal(logits(peft_model, inputs), expected)


# --- laying on, disabling, merging ---


@families
@kinds
def test_an_adapter_computes_what_its_overlay_does(family: str, kind: Kind) -> None:
    peft_model, neurons, inputs = adapted(family, kind)
    plain = tiny_model(family)
    base = logits(plain, inputs)
    peft_model.base_model.overlay(neurons).lay_on(plain)
    expected = logits(plain, inputs)
    assert not torch.equal(expected, base)
    assert torch.equal(logits(peft_model, inputs), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), base)
    assert torch.equal(logits(peft_model, inputs), expected)
    peft_model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(peft_model, inputs), expected)
    peft_model.unmerge_adapter()
    assert differing(state(peft_model.get_base_model()), state(tiny_model(family))) == []
    assert torch.equal(logits(peft_model, inputs), expected)
    assert differing(state(peft_model.merge_and_unload(safe_merge=True)), state(plain)) == []


@pytest.mark.parametrize("merged", [True, False])
def test_unloading_gives_the_base_back(merged: bool) -> None:
    peft_model, _, inputs = adapted()
    logits(peft_model, inputs)
    if merged:
        peft_model.merge_adapter()
    base = peft_model.unload()
    assert not layers(base)
    assert differing(state(base), state(tiny_model())) == []


def test_disabling_a_merged_adapter_unmerges_it() -> None:
    peft_model, _, inputs = adapted()
    expected = logits(peft_model, inputs)
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), logits(tiny_model(), inputs))
    assert torch.equal(logits(peft_model, inputs), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    peft_model, _, _ = adapted()
    with torch.no_grad():
        layers(peft_model)[-1].neft_rows["default"][0, 0] = value
    with pytest.raises(ValueError, match="NaNs detected"):
        peft_model.merge_adapter(safe_merge=True)


def test_merging_one_of_two_adapters() -> None:
    peft_model, first, second, inputs = two_adapters()
    plain = tiny_model()
    peft_model.base_model.overlay(second, "other").lay_on(plain)
    merged = peft_model.merge_and_unload(adapter_names=["other"])
    assert differing(state(merged), state(plain)) == []
    assert torch.equal(logits(merged, inputs), logits(plain, inputs))
    assert first != second


# --- several adapters ---


@some_families
def test_disjoint_adapters_active_together_are_both_laid_on(family: str) -> None:
    peft_model, first, second, inputs = two_adapters(family)
    plain = tiny_model(family)
    peft_model.base_model.overlay(first).lay_on(plain)
    peft_model.base_model.overlay(second, "other").lay_on(plain)
    peft_model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
    peft_model(**inputs).loss.backward()
    expected = masked_gradients(plain, first | second, inputs)
    both = {name: collect(peft_model, name) for name in ("default", "other")}
    whole = (first | second).rows()
    for adapter, neurons in (("default", first), ("other", second)):
        for name, rows in neurons.rows().items():
            places = torch.isin(torch.from_numpy(whole[name].positions), torch.from_numpy(rows.positions))
            torch.testing.assert_close(both[adapter][name], expected[name][places], rtol=1e-5, atol=1e-6)
    peft_model.merge_adapter()
    assert differing(held(peft_model), state(plain)) == []
    peft_model.unmerge_adapter()
    assert differing(held(peft_model), state(tiny_model(family))) == []


@pytest.mark.parametrize("use", [lambda model, inputs: model(**inputs), lambda model, _: model.merge_adapter()])
def test_overlapping_adapters_are_refused_together(use: Callable[[PeftModel, Inputs], Any]) -> None:
    peft_model, *_, inputs = two_adapters(disjoint=False)
    peft_model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="adapters 'default' and 'other' train the same weights"):
        use(peft_model, inputs)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), logits(tiny_model(), inputs))


def test_rows_and_columns_of_one_matrix_are_refused_together() -> None:
    model = tiny_model()
    up = "model.layers.0.mlp.up_proj"
    config = NeftConfig.from_neurons(
        NeuronSet(NeuronSpace.from_model(model, ["ffn_in"]), {"model.layers.0.ffn_in": [1]})
    )
    peft_model = get_peft_model(model, config)
    peft_model.add_adapter("other", NeftConfig(columns={up: 2}))
    peft_model.get_base_model().get_submodule(up).neft_positions["other"].copy_(torch.tensor([3, 4]))
    peft_model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="train the same weights"):
        peft_model(**batch(model))


@some_families
def test_switching_deleting_and_adding_adapters(family: str) -> None:
    peft_model, first, second, inputs = two_adapters(family, disjoint=False)
    expected = {}
    for name, neurons in (("default", first), ("other", second)):
        plain = tiny_model(family)
        peft_model.base_model.overlay(neurons, name).lay_on(plain)
        expected[name] = logits(plain, inputs)
    for name in ("default", "other", "other", "default"):
        peft_model.set_adapter(name)
        assert torch.equal(logits(peft_model, inputs), expected[name])
        assert {p.requires_grad for n, p in peft_model.named_parameters() if f".{name}" in n} == {True}
        assert sum(p.requires_grad for p in peft_model.parameters()) == len(layers(peft_model))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        peft_model.delete_adapter("default")
    assert all(
        "default" not in layer.neft_rows and "default" not in layer.neft_positions for layer in layers(peft_model)
    )
    assert torch.equal(logits(peft_model, inputs), expected["other"])
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), logits(tiny_model(family), inputs))
    peft_model.add_adapter("third", NeftConfig.from_neurons(first))
    peft_model.set_adapter("third")
    assert torch.equal(logits(peft_model, inputs), logits(tiny_model(family), inputs))
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        peft_model.delete_adapter("third")
    peft_model.delete_adapter("other")
    assert differing(held(peft_model), state(tiny_model(family))) == []


def test_an_adapter_on_other_modules_stays_inactive_until_it_is_set() -> None:
    model = tiny_model()
    ffn = draw(NeuronSpace.from_model(model, ["ffn"]))
    attention = draw(NeuronSpace.from_model(model, ["attention"]))
    inputs = batch(model)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(ffn))
    jitter(peft_model)
    expected = logits(peft_model, inputs)
    peft_model.add_adapter("other", NeftConfig.from_neurons(attention))
    jitter(peft_model, "other")
    assert torch.equal(logits(peft_model, inputs), expected)
    peft_model.set_adapter("other")
    plain = tiny_model()
    peft_model.base_model.overlay(attention, "other").lay_on(plain)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))


# --- saving and loading ---

RELOAD = """
import sys, torch
import neft
from peft import PeftModel
from tests.tiny import FAMILIES, tiny_model
from tests.neft.helpers import differing, logits, state

for family in FAMILIES:
    saved = torch.load(f"{sys.argv[1]}/{family}.pt")
    for low_memory in (False, True):
        model = PeftModel.from_pretrained(
            tiny_model(family), f"{sys.argv[1]}/{family}", low_cpu_mem_usage=low_memory
        )
        assert torch.equal(logits(model, saved["inputs"]), saved["logits"]), family
        assert differing(state(model.merge_and_unload()), saved["merged"]) == [], family
"""


def test_a_saved_adapter_computes_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    for family in FAMILIES:
        peft_model, _, inputs = adapted(family, "ffn", "attention")
        peft_model.save_pretrained(tmp_path / family)
        expected = logits(peft_model, inputs)
        merged = state(peft_model.merge_and_unload())
        torch.save({"inputs": inputs, "logits": expected, "merged": merged}, tmp_path / f"{family}.pt")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_a_saved_adapter_is_small(tmp_path: Path) -> None:
    peft_model, neurons, _ = adapted()
    peft_model.save_pretrained(tmp_path)
    saved = get_peft_model_state_dict(peft_model)
    positions = sum(len(rows.positions) for rows in neurons.rows().values())
    assert sum(tensor.numel() for tensor in saved.values()) == neurons.parameters + positions
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "NEFT"
    assert config["space"] == neurons.space.fingerprint
    assert sum(config["rows"].values()) + sum(config["columns"].values()) == positions


def test_loading_a_second_adapter_leaves_the_first_active(tmp_path: Path) -> None:
    peft_model, *_, inputs = two_adapters(disjoint=False)
    peft_model.save_pretrained(tmp_path)
    expected = {}
    for name in ("other", "default"):
        peft_model.set_adapter(name)
        expected[name] = logits(peft_model, inputs)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded, inputs), expected["default"])
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    assert torch.equal(logits(loaded, inputs), expected["default"])
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded, inputs), expected["other"])


@pytest.mark.parametrize(
    "load",
    [
        lambda model, other: set_peft_model_state_dict(model, get_peft_model_state_dict(other)),
        lambda model, other: model.load_state_dict(other.state_dict()),
        lambda model, other: model.load_state_dict(
            {name: tensor for name, tensor in other.state_dict().items() if ".neft_" in name}, strict=False
        ),
    ],
    ids=["by PEFT", "whole model", "rows alone"],
)
def test_other_rows_loaded_over_an_adapter_in_use_take_its_place(load: Callable[[PeftModel, PeftModel], Any]) -> None:
    peft_model, neurons, inputs = adapted()
    other = get_peft_model(tiny_model(), NeftConfig.from_neurons(draw(neurons.space, seed=9)))
    jitter(other, seed=9)
    logits(peft_model, inputs)
    load(peft_model, other)
    assert torch.equal(logits(peft_model, inputs), logits(other, inputs))
    assert differing(state(peft_model.unload()), state(tiny_model())) == []


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    peft_model, _, inputs = adapted()
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    for model in (peft_model, loaded):
        train(model, inputs)
    assert torch.equal(logits(loaded, inputs), logits(peft_model, inputs))


def test_an_adapter_without_positions_is_refused_at_forward() -> None:
    model = tiny_model()
    peft_model = get_peft_model(model, NeftConfig(rows={"model.layers.0.mlp.up_proj": 3}))
    with pytest.raises(InputError, match=r"'default' has no valid positions.*NeftConfig\.from_neurons"):
        peft_model(**batch(model))
    with pytest.raises(InputError, match="no valid positions"):
        peft_model.merge_adapter()


@pytest.mark.parametrize(
    ("positions", "valid"), [([0, 1, 64], False), ([0, 1, 1], False), ([-1, 0, 1], False), ([0, 1, 63], True)]
)
def test_loaded_positions_are_checked(positions: list[int], valid: bool) -> None:
    model = tiny_model()
    peft_model = get_peft_model(model, NeftConfig(rows={"model.layers.0.mlp.up_proj": 3}))
    saved = {
        name: torch.tensor(positions) if "positions" in name else tensor
        for name, tensor in get_peft_model_state_dict(peft_model).items()
    }
    set_peft_model_state_dict(peft_model, saved)
    if valid:
        assert logits(peft_model, batch(model)).isfinite().all()
        set_peft_model_state_dict(peft_model, {name: tensor - 1 for name, tensor in saved.items()})
    with pytest.raises(InputError, match="no valid positions"):
        peft_model(**batch(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeftConfig.from_neurons(NeuronSpace.from_model(tiny_model()).none()), "set is empty"),
        (lambda: NeftConfig(rows={"a": 1}, columns={"a": 1}), "'a' stands under both"),
        (lambda: get_peft_model(tiny_model(), NeftConfig()), "names no rows or columns"),
        (lambda: get_peft_model(tiny_model(), NeftConfig(rows={"model.layer.0": 1})), "no module 'model.layer.0'"),
        (
            lambda: get_peft_model(tiny_model(), NeftConfig(rows={"model.layers.0.mlp.up_proj": 65})),
            "65 rows .* has 64",
        ),
        (lambda: get_peft_model(tiny_model(), NeftConfig(rows={"model.norm": 1})), "no weight matrix"),
    ],
)
def test_configs_that_fit_no_model_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_neurons_of_another_model_are_refused() -> None:
    neurons = draw(NeuronSpace.from_model(tiny_model("gpt2")))
    with pytest.raises(InputError, match="the neurons belong to another model"):
        get_peft_model(tiny_model(), NeftConfig.from_neurons(neurons))


def test_an_overlay_of_other_neurons_is_refused() -> None:
    peft_model, neurons, _ = adapted()
    with pytest.raises(InputError, match="trains other rows of module"):
        peft_model.base_model.overlay(draw(neurons.space, seed=5))
    with pytest.raises(InputError, match="does not train module"):
        peft_model.base_model.overlay(neurons, "other")


def test_the_overlay_is_a_copy_in_the_dtype_of_the_base() -> None:
    peft_model, neurons, inputs = adapted(dtype=torch.bfloat16)
    overlay = peft_model.base_model.overlay(neurons)
    before = {name: rows.clone() for name, rows in overlay.values.items()}
    assert {rows.dtype for rows in overlay.values.values()} == {torch.bfloat16}
    train(peft_model, inputs)
    assert_same(dict(overlay.values), before)


def test_an_adapter_can_be_injected_into_a_model() -> None:
    model = tiny_model()
    neurons = draw(NeuronSpace.from_model(model))
    injected = inject_adapter_in_model(NeftConfig.from_neurons(neurons), model)
    assert len(layers(injected)) == len(neurons.rows())
    assert torch.equal(logits(injected, batch(model)), logits(tiny_model(), batch(model)))


# --- dtypes, modes, and what others do to the base meanwhile ---


@some_families
def test_single_precision_rows_train_over_a_bfloat16_base(family: str) -> None:
    peft_model, neurons, inputs = adapted(family, "ffn", "attention", dtype=torch.bfloat16, train=True)
    base = state(tiny_model(family).to(torch.bfloat16))
    rows = {name: p.clone() for name, p in peft_model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in rows.values()} == {torch.float32}
    train(peft_model, inputs)
    moved = dict(peft_model.named_parameters())
    assert all((moved[name] != before).any() for name, before in rows.items())
    # Finer than bfloat16 can hold: single precision is what accumulates.
    assert any((p.bfloat16().float() != p).any() for p in moved.values() if p.requires_grad)
    peft_model.eval()
    plain = tiny_model(family).to(torch.bfloat16)
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
    with peft_model.disable_adapter():
        assert differing(held(peft_model), base) == []
    assert differing(state(peft_model.unload()), base) == []


@some_families
def test_autocast_computes_and_trains_as_the_plain_model_does(family: str) -> None:
    peft_model, neurons, inputs = adapted(family, "ffn", "attention")
    plain = tiny_model(family)
    peft_model.base_model.overlay(neurons).lay_on(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
        actual = gradients(peft_model, inputs)
        expected = masked_gradients(plain, neurons, inputs)
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    assert_close(actual, expected, tolerance=0.02)


def test_training_works_after_inference_mode() -> None:
    peft_model, _, inputs = adapted()
    expected = gradients(copy.deepcopy(peft_model), inputs)
    with torch.inference_mode():
        first = peft_model(**inputs).logits
    assert_same(gradients(peft_model, inputs), expected)
    train(peft_model, inputs)
    with torch.inference_mode():
        assert not torch.equal(peft_model(**inputs).logits, first)
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(**inputs).logits, logits(tiny_model(), inputs))
    train(peft_model, inputs, steps=1)
    assert differing(state(peft_model.unload()), state(tiny_model())) == []


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.to("cpu"),
        lambda m: m.float(),
        lambda m: m.double(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_a_model_in_use_moves_its_base(move: Callable[[nn.Module], nn.Module], dtype: torch.dtype) -> None:
    peft_model, neurons, inputs = adapted(dtype=dtype)
    peft_model.requires_grad_(False)
    logits(peft_model, inputs)
    move(peft_model)
    base, plain = move(tiny_model().to(dtype)), move(tiny_model().to(dtype))
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
    assert differing(state(peft_model.unload()), state(base)) == []


def into(peft_model: PeftModel, plain: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A plain model's state by the names it has inside the adapted model."""
    names = {name.replace(".base_layer.", "."): name for name in peft_model.get_base_model().state_dict()}
    return {names[name]: tensor for name, tensor in plain.items()}


def test_a_base_loaded_while_rows_are_laid_is_the_base_from_then_on() -> None:
    peft_model, neurons, inputs = adapted()
    logits(peft_model, inputs)
    loaded = moved_base(tiny_model())
    peft_model.get_base_model().load_state_dict(into(peft_model, loaded), strict=False)
    plain = tiny_model()
    plain.load_state_dict(loaded)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
    assert differing(state(peft_model.unload()), loaded) == []


def test_a_state_dict_holds_the_base_and_not_what_is_laid_on_it() -> None:
    peft_model, _, inputs = adapted()
    logits(peft_model, inputs)
    assert differing(state(peft_model.get_base_model()), state(tiny_model())) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: state])
def test_going_back_to_an_earlier_state_keeps_the_base(copied: Callable[[Any], Any]) -> None:
    """As who keeps the best state of a training does."""
    peft_model, _, inputs = adapted(train=True)
    train(peft_model, inputs)
    best = copied(peft_model.state_dict())
    expected = logits(peft_model, inputs)
    if copied is copy.deepcopy:
        train(peft_model, inputs)
        assert not torch.equal(logits(peft_model, inputs), expected)
    peft_model.load_state_dict(best)
    assert torch.equal(logits(peft_model, inputs), expected)
    assert differing(state(peft_model.unload()), state(tiny_model())) == []


def test_rows_written_to_the_base_by_others_stay_and_the_others_come_back() -> None:
    peft_model, neurons, inputs = adapted()
    logits(peft_model, inputs)
    name = next(iter(neurons.rows()))
    layer = peft_model.get_base_model().get_submodule(name)
    laid = neurons.rows()[name].positions
    written = [next(row for row in range(64) if row not in laid), int(laid[0])]
    with torch.no_grad():
        layer.weight[written] = 1.0
    base = state(peft_model.unload())
    expected = state(tiny_model())
    expected[f"{name}.weight"][written] = 1.0
    assert differing(base, expected) == []


@pytest.mark.parametrize("training", [True, False])
def test_an_optimiser_that_writes_through_data_is_followed(training: bool) -> None:
    peft_model, neurons, inputs = adapted(train=training)
    for _ in range(2):
        peft_model(**inputs).loss.backward()
        for parameter in peft_model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=0.5)
        peft_model.zero_grad()
        plain = tiny_model().train(training)
        peft_model.base_model.overlay(neurons).lay_on(plain)
        assert torch.equal(logits(peft_model.eval(), inputs), logits(plain.eval(), inputs))
        peft_model.train(training)


def test_a_frozen_adapter_is_laid_once_and_again_when_it_changes() -> None:
    peft_model, neurons, inputs = adapted()
    peft_model.requires_grad_(False)
    logits(peft_model, inputs)
    writes = [layer.weight._version for layer in layers(peft_model)]
    logits(peft_model, inputs)
    assert [layer.weight._version for layer in layers(peft_model)] == writes
    jitter(peft_model, seed=3)
    plain = tiny_model()
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))


def test_an_adapter_that_is_frozen_after_a_fused_step_is_followed() -> None:
    peft_model, neurons, inputs = adapted()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.05, fused=True)
    peft_model(**inputs).loss.backward()
    optimizer.step()
    peft_model.requires_grad_(False)
    plain = tiny_model()
    peft_model.base_model.overlay(neurons).lay_on(plain)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_every_adamw_is_followed_in_evaluation_mode(options: dict[str, bool]) -> None:
    peft_model, neurons, inputs = adapted()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.05, **options)
    for _ in range(2):
        peft_model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain = tiny_model()
        peft_model.base_model.overlay(neurons).lay_on(plain)
        assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("merged", [True, False])
def test_a_copy_of_a_model_in_use_is_its_own(copied: Callable[[Any], Any], merged: bool) -> None:
    peft_model, _, inputs = adapted()
    train(peft_model, inputs)
    expected = logits(peft_model, inputs)
    if merged:
        peft_model.merge_adapter()
    other = copied(peft_model)
    jitter(other)
    assert torch.equal(logits(peft_model, inputs), expected)
    for model in (peft_model, other):
        assert differing(state(model.unload()), state(tiny_model())) == []


# --- a classifier beside the neurons ---


def test_a_classifier_is_trained_saved_and_loaded_beside_the_neurons(tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(tiny_model().config).eval()

    base = classifier()
    neurons = draw(NeuronSpace.from_model(base))
    before = state(base)
    inputs = {**batch(base), "labels": torch.tensor([0, 1, 0, 1])}
    reference = logits(base, inputs)
    peft_model = get_peft_model(
        base, NeftConfig.from_neurons(neurons, task_type=TaskType.SEQ_CLS, modules_to_save=["score"])
    )
    trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "neft_rows" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    train(peft_model, inputs)
    expected = logits(peft_model, inputs)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(loaded, inputs), expected)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), reference)
    # PEFT gives trained modules back as they are, whether it merges or not.
    assert differing(state(loaded.unload()), before) == ["score.weight"]
    merged = peft_model.merge_and_unload()
    assert torch.equal(logits(merged, inputs), expected)
    assert "score.weight" in differing(state(merged), before)


# --- memory ---


class Allocations(TorchDispatchMode):
    """Shapes of the tensors that operations make anew; views of what was there do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.fixture
def saved() -> Iterator[list[torch.Tensor]]:
    """The tensors that forwards save for backward while the fixture lasts."""
    tensors: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield tensors


def layer_of(family: str, kind: Kind) -> NeftLinear:
    return layers(adapted(family, kind)[0])[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("needs_input", [True, False])
def test_a_column_saves_the_chosen_inputs_alone(family: str, needs_input: bool, saved: list[torch.Tensor]) -> None:
    layer = layer_of(family, "ffn_out")
    x = torch.randn(3, 7, 64, requires_grad=needs_input)
    layer(x)
    assert sorted(tuple(tensor.shape) for tensor in saved) == [(3, 7, 5), (5, 32)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_saves_the_input_itself(family: str, saved: list[torch.Tensor]) -> None:
    layer = layer_of(family, "ffn_in")
    x = torch.randn(3, 7, 32, requires_grad=True)
    layer(x)
    assert sorted(tuple(tensor.shape) for tensor in saved) == [(3, 7, 32), (5, 32)]
    assert x.data_ptr() in {tensor.data_ptr() for tensor in saved}


def test_a_frozen_or_disabled_layer_saves_no_input(saved: list[torch.Tensor]) -> None:
    layer = layer_of("llama", "ffn_in")
    layer.neft_rows["default"].requires_grad_(False)
    x = torch.randn(3, 7, 32, requires_grad=True)
    layer(x)
    assert [tuple(tensor.shape) for tensor in saved] == [(5, 32)]
    layer.enable_adapters(False)
    saved.clear()
    layer(x)
    assert saved == []


@some_families
def test_no_weight_is_saved_and_no_dense_gradient_is_made(family: str, saved: list[torch.Tensor]) -> None:
    peft_model, neurons, inputs = adapted(family, "ffn", "attention")
    weights = {layer.weight.untyped_storage().data_ptr(): tuple(layer.weight.shape) for layer in layers(peft_model)}
    loss = peft_model(**inputs).loss
    assert saved
    assert not weights.keys() & {tensor.untyped_storage().data_ptr() for tensor in saved}
    with Allocations() as made:
        loss.backward()
    shapes = {shape for weight in weights.values() for shape in (weight, weight[::-1])}
    assert made.shapes
    assert not shapes & set(made.shapes)
    assert len(weights) == len(neurons.rows())


def test_a_tied_weight_is_refused() -> None:
    model = tiny_model("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(InputError, match=r"'lm_head' shares its weight with 'model.embed_tokens'"):
        get_peft_model(model, NeftConfig(rows={"lm_head": 1}))


def test_inference_does_not_look_at_what_is_settled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its rows are laid on and frozen, a layer goes straight to its product, until somebody writes either."""
    model = tiny_model()
    space = NeuronSpace.from_model(model)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(NeuronSet(space, {space.sites[0].name: [1, 5]})))
    layer = next(module for module in peft_model.modules() if isinstance(module, NeftLinear))
    peft_model.set_adapter("default", inference_mode=True)
    x = torch.randn(2, layer.in_features)
    first = layer(x)
    calls: list[tuple[str, ...]] = []
    lay = layer.lay
    monkeypatch.setattr(layer, "lay", lambda adapters: (calls.append(adapters), lay(adapters))[1])
    assert torch.equal(layer(x), first)
    assert calls == []
    with torch.no_grad():
        layer.neft_rows["default"].add_(1)
    assert not torch.equal(layer(x), first)
    assert calls == [("default",)]
    with torch.no_grad():
        layer.get_base_layer().weight.mul_(2)
    layer(x)
    assert len(calls) == 2
