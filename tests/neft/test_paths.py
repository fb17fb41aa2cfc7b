"""The two paths compute and train the same; batches that mix adapters; compiled layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, LlamaForSequenceClassification, PreTrainedModel

from neft import InputError, NeftConfig, NeuronSet, NeuronSpace
from neft.neurons import KINDS, Kind
from neft.tuner import NeftLinear
from tests.neft.helpers import (
    Inputs,
    State,
    collect,
    differing,
    draw,
    gradients,
    held,
    jitter,
    layers,
    logits,
    state,
    train,
)
from tests.neft.test_tuner import assert_close, masked_gradients
from tests.tiny import CAUSAL, FAMILIES, batch, tiny_model

PATHS = ("inplace", "side")
families = pytest.mark.parametrize("family", FAMILIES)
paths = pytest.mark.parametrize("path", PATHS)
#: Plain and tied, Conv1D and bias, fused per head and bias, encoder and decoder with tied embeddings.
some_families = pytest.mark.parametrize("family", ["gemma", "gpt2", "gpt_neox", "t5"])
#: Rows in single precision over a bfloat16 base, as PEFT makes them, or in the dtype of the base.
row_dtypes = pytest.mark.parametrize("single", [True, False], ids=["fp32 rows", "bf16 rows"])
BF16 = 0.03


def adapted(
    path: str,
    family: str = "llama",
    *kinds: Kind,
    dtype: torch.dtype = torch.float32,
    each: int = 5,
    training: bool = False,
    **options: Any,
) -> tuple[PeftModel, NeuronSet, Inputs]:
    """A tiny model with an adapter of the given path, whose rows have moved, its neurons, and a batch."""
    model = tiny_model(family).to(dtype)
    neurons = draw(NeuronSpace.from_model(model, kinds or ("ffn", "attention")), each)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, path=path), **options).train(training)
    jitter(peft_model)
    return peft_model, neurons, batch(model)


def overlaid(peft_model: PeftModel, neurons: NeuronSet, plain: PreTrainedModel, adapter: str = "default") -> Any:
    """The plain model with the adapter's rows in it."""
    peft_model.base_model.overlay(neurons, adapter).lay_on(plain)
    return plain


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of a whole tensor."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def flat(tensors: State) -> torch.Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def assert_near(actual: State, expected: State, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert error(actual[name], values) < tolerance, name


# --- the two paths agree, and with a plain model ---


@families
@pytest.mark.parametrize("kind", KINDS)
def test_the_side_path_computes_and_trains_as_masked_gradients_do(family: str, kind: Kind) -> None:
    peft_model, neurons, inputs = adapted("side", family, kind)
    base = state(tiny_model(family))
    plain = overlaid(peft_model, neurons, tiny_model(family))
    expected = logits(plain, inputs)
    assert error(logits(tiny_model(family), inputs), expected) > 1e-3
    torch.testing.assert_close(logits(peft_model, inputs), expected, rtol=1e-5, atol=2e-5)
    assert_close(gradients(peft_model, inputs), masked_gradients(plain, neurons, inputs), tolerance=2e-5)
    assert differing(held(peft_model), base) == []


@families
@paths
@row_dtypes
def test_both_paths_agree_with_a_plain_model_in_bfloat16(family: str, path: str, single: bool) -> None:
    bf16 = torch.bfloat16
    peft_model, neurons, inputs = adapted(path, family, dtype=bf16, autocast_adapter_dtype=single)
    rows = {layer.neft_rows["default"].dtype for layer in layers(peft_model)}
    assert rows == {torch.float32 if single else bf16}
    plain = overlaid(peft_model, neurons, tiny_model(family).to(bf16))
    expected = logits(plain, inputs)
    assert expected.dtype == logits(peft_model, inputs).dtype == bf16
    # What the same weights give in single precision says how much of a difference is rounding.
    exact = overlaid(peft_model, neurons, tiny_model(family).to(bf16).float())
    truth = logits(exact, inputs)
    rounding = error(expected, truth)
    assert error(logits(tiny_model(family).to(bf16), inputs), truth) > 3 * rounding > 0
    assert error(logits(peft_model, inputs), truth) < 2 * rounding
    found = gradients(peft_model, inputs)
    assert {gradient.dtype for gradient in found.values()} == rows
    true, plain_ones = masked_gradients(exact, neurons, inputs), masked_gradients(plain, neurons, inputs)
    # Twice the rounding on processors with bfloat16 products, 2.7 times it on one without them.
    assert error(flat(found), flat(true)) < 3 * error(flat(plain_ones), flat(true)) < 0.24


@some_families
def test_both_paths_train_to_the_same_weights(family: str) -> None:
    found = []
    for path in PATHS:
        peft_model, neurons, inputs = adapted(path, family, training=False)
        before = dict(peft_model.base_model.overlay(neurons).values)
        # SGD, since AdamW's first steps make a step of every rounding.
        optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(4):
            for part in (slice(0, 2), slice(2, 4)):
                (peft_model(**{name: values[part] for name, values in inputs.items()}).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(dict(peft_model.base_model.overlay(neurons).values))
        assert all(error(rows, before[name]) > 1e-4 for name, rows in found[-1].items())
        assert differing(state(peft_model.unload()), state(tiny_model(family))) == []
    assert_near(found[1], found[0], 1e-5)


@row_dtypes
def test_both_paths_train_alike_in_bfloat16(single: bool) -> None:
    losses = []
    for path in PATHS:
        peft_model, _, inputs = adapted(path, dtype=torch.bfloat16, autocast_adapter_dtype=single, each=20)
        optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.2)
        losses.append([])
        for _ in range(8):
            loss = peft_model(**inputs).loss
            loss.backward()
            losses[-1].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0][-1] < losses[0][0] - 0.5
    # Roundings add up over the steps: to 0.14 on a processor without bfloat16 products, of a loss that fell by 2.
    assert losses[1] == pytest.approx(losses[0], abs=0.2)


@some_families
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing_on_the_side_path(family: str, reentrant: bool) -> None:
    peft_model, _, inputs = adapted("side", family, training=True)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            peft_model.enable_input_require_grads()
            peft_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        found.append(gradients(peft_model, inputs))
    assert_close(*found, tolerance=1e-5)


def test_gradients_add_up_over_micro_batches_on_the_side_path() -> None:
    peft_model, _, inputs = adapted("side")
    expected = {name: 2 * gradient for name, gradient in gradients(peft_model, inputs).items()}
    peft_model(**inputs).loss.backward()
    assert_close(gradients(peft_model, inputs), expected, tolerance=1e-6)


@some_families
def test_autocast_trains_alike_on_both_paths(family: str) -> None:
    found = []
    for path in PATHS:
        peft_model, _, inputs = adapted(path, family)
        with torch.autocast("cpu", torch.bfloat16):
            found.append((logits(peft_model, inputs), gradients(peft_model, inputs)))
        assert {gradient.dtype for gradient in found[-1][1].values()} == {torch.float32}
    assert error(found[1][0], found[0][0]) < BF16
    assert error(flat(found[1][1]), flat(found[0][1])) < 2 * BF16


def test_disjoint_adapters_are_active_together_on_the_side_path() -> None:
    peft_model, first, second, inputs = two("side", disjoint=True)
    peft_model.base_model.set_adapter(["default", "other"])
    plain = overlaid(peft_model, first, overlaid(peft_model, second, tiny_model(), "other"))
    torch.testing.assert_close(logits(peft_model, inputs), logits(plain, inputs), rtol=1e-5, atol=1e-5)


def test_overlapping_adapters_are_refused_together_on_the_side_path() -> None:
    peft_model, *_, inputs = two("side", disjoint=False)
    peft_model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="'default' and 'other' train the same weights"):
        peft_model(**inputs)


# --- saving, copying, moving, merging on the side path ---


def test_both_paths_have_the_same_state() -> None:
    states = [adapted(path)[0].state_dict() for path in PATHS]
    assert list(states[0]) == list(states[1])
    used = adapted("side")[0]
    logits(used, batch(tiny_model()))
    assert list(used.state_dict()) == list(states[0])
    assert differing(*states) == []


@paths
def test_an_adapter_trained_on_one_path_runs_on_the_other(path: str, tmp_path: Path) -> None:
    peft_model, neurons, inputs = adapted(path, training=True)
    train(peft_model, inputs)
    peft_model.eval().save_pretrained(tmp_path)
    expected = logits(peft_model, inputs)
    other = PATHS[1 - PATHS.index(path)]
    config = NeftConfig.from_pretrained(tmp_path)
    assert config.path == path
    same = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(same, inputs), expected)
    config.path = other
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, config=config)
    assert {layer.path for layer in layers(loaded)} == {other}
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=1e-5, atol=1e-5)
    assert (
        differing(dict(loaded.base_model.overlay(neurons).values), dict(peft_model.base_model.overlay(neurons).values))
        == []
    )
    # A whole state moves over as well.
    fresh = adapted(other)[0]
    fresh.load_state_dict(peft_model.state_dict())
    assert torch.equal(logits(fresh, inputs), logits(loaded, inputs))


def test_rows_loaded_over_an_adapter_in_use_take_its_place_on_the_side_path() -> None:
    """Other positions come with them, and the base's rows there are read anew."""
    peft_model, neurons, inputs = adapted("side")
    other = get_peft_model(tiny_model(), NeftConfig.from_neurons(draw(neurons.space, seed=9), path="side"))
    jitter(other, seed=9)
    logits(peft_model, inputs)
    peft_model.load_state_dict({name: t for name, t in other.state_dict().items() if ".neft_" in name}, strict=False)
    assert torch.equal(logits(peft_model, inputs), logits(other, inputs))


def test_a_base_that_changes_is_followed_on_the_side_path() -> None:
    peft_model, neurons, inputs = adapted("side")
    logits(peft_model, inputs)
    plain = tiny_model()
    with torch.no_grad():
        for model in (peft_model.get_base_model(), plain):
            for module in (model.get_submodule(name) for name in neurons.rows()):
                module.weight.mul_(0.5)
    overlaid(peft_model, neurons, plain)
    torch.testing.assert_close(logits(peft_model, inputs), logits(plain, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_on_the_side_path_is_its_own(copied: Callable[[Any], Any]) -> None:
    peft_model, _, inputs = adapted("side")
    expected = logits(peft_model, inputs)
    other = copied(peft_model)
    assert torch.equal(logits(other, inputs), expected)
    jitter(other)
    assert not torch.equal(logits(other, inputs), expected)
    assert torch.equal(logits(peft_model, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_a_model_in_use_on_the_side_path_can_be_moved(dtype: torch.dtype) -> None:
    peft_model, neurons, inputs = adapted("side")
    logits(peft_model, inputs)
    peft_model.to(dtype)
    plain = overlaid(peft_model, neurons, tiny_model().to(dtype))
    assert logits(peft_model, inputs).dtype == dtype
    assert error(logits(peft_model, inputs), logits(plain, inputs)) < (BF16 if dtype == torch.bfloat16 else 1e-5)
    assert differing(state(peft_model.unload()), state(tiny_model().to(dtype))) == []


def test_the_side_path_merges_to_the_overlay() -> None:
    peft_model, neurons, inputs = adapted("side")
    before = logits(peft_model, inputs)
    plain = overlaid(peft_model, neurons, tiny_model())
    peft_model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(peft_model, inputs), logits(plain, inputs))
    peft_model.unmerge_adapter()
    assert differing(held(peft_model), state(tiny_model())) == []
    assert torch.equal(logits(peft_model, inputs), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, inputs), logits(tiny_model(), inputs))
    assert differing(state(peft_model.merge_and_unload()), state(plain)) == []


def test_adapters_of_two_paths_in_one_model_are_refused() -> None:
    peft_model, neurons, _ = adapted("side")
    with pytest.raises(InputError, match="has path 'inplace', but the model's layers run 'side'"):
        peft_model.add_adapter("other", NeftConfig.from_neurons(neurons))
    with pytest.raises(InputError, match="unknown path 'sides'"):
        NeftConfig.from_neurons(neurons, path="sides")


# --- batches that mix adapters ---

#: Base first, between and last, each adapter more than once and not in order.
NAMES = ["__base__", "other", "default", "other", "__base__", "default"]


def two(path: str, family: str = "llama", disjoint: bool = False) -> tuple[PeftModel, NeuronSet, NeuronSet, Inputs]:
    """Adapters `default`, which is active, and `other`, which trains attention alone where they may overlap."""
    model = tiny_model(family)
    space = NeuronSpace.from_model(model, ["ffn", "attention"])
    first = NeuronSet(space, {site.name: range(0, 6, 2) for site in space.sites})
    second = NeuronSet(space, {site.name: range(1, 6, 2) if disjoint else range(4) for site in space.sites[-3:]})
    peft_model = get_peft_model(model, NeftConfig.from_neurons(first, path=path))
    peft_model.add_adapter("other", NeftConfig.from_neurons(second, path=path))
    for seed, name in enumerate(("default", "other")):
        jitter(peft_model, name, seed)
        jitter(peft_model, name, seed + 10)
    return peft_model.eval(), first, second, batch(model, rows=len(NAMES))


def one_by_one(peft_model: PeftModel, compute: Callable[[nn.Module], torch.Tensor], names: list[str]) -> torch.Tensor:
    """What each example gets from the model with its adapter alone."""
    found = {}
    for name in dict.fromkeys(names):
        if name == "__base__":
            with peft_model.disable_adapter():
                found[name] = compute(peft_model)
        else:
            peft_model.set_adapter(name)
            found[name] = compute(peft_model)
    peft_model.set_adapter("default")
    size = max(values.shape[1] for values in found.values())
    found = {name: nn.functional.pad(v, (0, size - v.shape[1])) if v.ndim == 2 else v for name, v in found.items()}
    return torch.stack([found[name][place] for place, name in enumerate(names)])


@families
@paths
def test_each_example_of_a_batch_runs_with_its_own_adapter(family: str, path: str) -> None:
    peft_model, *_, inputs = two(path, family)
    base = state(tiny_model(family))
    active = logits(peft_model, inputs)
    expected = one_by_one(peft_model, lambda model: logits(model, inputs), NAMES)
    for first, second in ((0, 1), (1, 2), (2, 0)):
        assert error(logits(peft_model, inputs)[first], expected[second]) > 1e-3
    with torch.no_grad():
        mixed = peft_model(**inputs, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    plain = logits(tiny_model(family), inputs)
    rows = [place for place, name in enumerate(NAMES) if name == "__base__"]
    assert torch.equal(mixed[rows], plain[rows])
    assert error(mixed[2], plain[2]) > 1e-3
    # The active adapter is laid off meanwhile, and on again afterwards.
    assert differing(held(peft_model), base) == []
    assert torch.equal(logits(peft_model, inputs), active)
    assert differing(state(peft_model.unload()), base) == []


@pytest.mark.parametrize("family", [*CAUSAL, "t5", "t5_gated"])
@paths
@pytest.mark.parametrize("beams", [1, 3])
def test_each_example_is_generated_with_its_own_adapter(family: str, path: str, beams: int) -> None:
    peft_model, *_, inputs = two(path, family)
    ids = inputs["input_ids"][:, :6].clamp(min=3)
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = one_by_one(peft_model, lambda model: model.generate(input_ids=ids, **options), NAMES)
    mixed = peft_model.generate(input_ids=ids, **options, adapter_names=NAMES)
    mixed = nn.functional.pad(mixed, (0, expected.shape[1] - mixed.shape[1]))
    assert torch.equal(mixed, expected)
    alone = peft_model.generate(input_ids=ids, **options)
    assert alone.shape != mixed.shape or not torch.equal(alone, mixed)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_beams_may_be_asked_for_in_a_generation_config(family: str) -> None:
    peft_model, *_, inputs = two("side", family)
    ids = inputs["input_ids"][:, :6].clamp(min=3)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "adapter_names": NAMES}
    expected = peft_model.generate(ids, num_beams=2, num_return_sequences=2, max_new_tokens=5, **options)
    config = GenerationConfig.from_model_config(peft_model.get_base_model().config)
    config.update(num_beams=2, num_return_sequences=2, max_new_tokens=5)
    assert torch.equal(peft_model.generate(ids, generation_config=config, **options), expected)
    assert len(expected) == 2 * len(NAMES)


@paths
def test_gradients_of_a_mixed_batch_are_those_of_each_adapter_alone(path: str) -> None:
    peft_model, *_, inputs = two(path)
    peft_model.set_requires_grad(["default", "other"])
    peft_model(**inputs, adapter_names=NAMES).logits.square().sum().backward()
    found = {name: collect(peft_model, name) for name in ("default", "other")}
    peft_model.zero_grad()
    for name in ("default", "other"):
        peft_model.set_adapter(name)
        peft_model(**inputs).logits[
            [place for place, each in enumerate(NAMES) if each == name]
        ].square().sum().backward()
        assert_close(found[name], collect(peft_model, name), tolerance=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "t5", "bert"])
@pytest.mark.parametrize("count", [2, 3, 5, 12])
def test_a_batch_needs_a_name_for_every_example(family: str, count: int) -> None:
    peft_model, *_, inputs = two("side", family)
    message = f"adapter_names has {count} names for a batch of {len(NAMES)}; give one per example"
    with pytest.raises(InputError, match=message):
        peft_model(**inputs, adapter_names=["other"] * count)
    if family != "bert":
        with pytest.raises(InputError, match=message):
            peft_model.generate(inputs["input_ids"], adapter_names=["other"] * count, max_new_tokens=1)
        with pytest.raises(InputError, match=message):
            peft_model.generate(input_ids=inputs["input_ids"], adapter_names=["other"] * count, max_new_tokens=1)


@paths
def test_mixed_batches_that_cannot_be_run_are_refused(path: str) -> None:
    peft_model, *_, inputs = two(path)
    expected = logits(peft_model, inputs)
    with pytest.raises(InputError, match=r"unknown adapter 'othr' in adapter_names; did you mean 'other'"):
        peft_model(**inputs, adapter_names=[*NAMES[:-1], "othr"])
    peft_model.train()
    with pytest.raises(InputError, match=r"training mode; call eval\(\) first"):
        peft_model(**inputs, adapter_names=NAMES)
    peft_model.eval().merge_adapter()
    with pytest.raises(InputError, match=r"merged; call unmerge_adapter\(\) first"):
        peft_model(**inputs, adapter_names=NAMES)
    peft_model.unmerge_adapter()
    # None of this leaves a hook behind.
    assert torch.equal(logits(peft_model, inputs), expected)


def test_each_example_gets_its_adapters_classifier_too() -> None:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(tiny_model().config).eval()
    space = NeuronSpace.from_model(base)
    peft_model = get_peft_model(base, NeftConfig.from_neurons(draw(space), path="side", modules_to_save=["score"]))
    config = NeftConfig.from_neurons(draw(space, seed=1), path="side", modules_to_save=["score"])
    peft_model.add_adapter("other", config)
    jitter(peft_model)
    jitter(peft_model, "other", seed=2)
    with torch.no_grad():
        peft_model.get_base_model().score.modules_to_save["other"].weight.mul_(2)
        peft_model.get_base_model().score.modules_to_save["default"].weight.mul_(-1)
    peft_model.eval()
    inputs = {name: t for name, t in batch(tiny_model(), rows=len(NAMES)).items() if name != "labels"}
    expected = one_by_one(peft_model, lambda model: logits(model, inputs), NAMES)
    with torch.no_grad():
        mixed = peft_model(**inputs, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


# --- torch.compile ---


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@paths
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["ffn_in", "ffn_out"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_layer_trains_as_an_eager_one_without_graph_breaks(path: str, family: str, kind: Kind) -> None:
    eager, compiled = (layers(adapted(path, family, kind)[0])[0] for _ in range(2))
    base = compiled.get_base_layer().weight.detach().clone()
    width = compiled.in_features
    compiled(torch.zeros(1, 1, width))
    base = eager.get_base_layer().weight.detach().clone()
    traced = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    steps = [torch.optim.AdamW([layer.neft_rows["default"]], lr=0.1) for layer in (eager, compiled)]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(3, 5, width, generator=generator) for _ in range(2)]
        found = []
        for layer, module, step in ((eager, eager, steps[0]), (compiled, traced, steps[1])):
            own = [x.clone().requires_grad_() for x in inputs]
            # Two forwards before their backwards, as accumulation and several losses have them.
            outputs = [module(x) for x in own]
            sum(y.square().mean() for y in outputs).backward()
            rows = layer.neft_rows["default"]
            found.append([*(y.detach() for y in outputs), *(x.grad for x in own), rows.grad.clone()])
            assert layer.get_base_layer().weight.grad is None
            step.step()
            step.zero_grad()
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.neft_rows["default"], eager.neft_rows["default"], rtol=1e-4, atol=1e-5)
    # After the last optimiser step, eager forward and the base are right too.
    x = torch.randn(2, width)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled.unload_and_optionally_merge_module(False).weight, base)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_base_comes_back_after_a_compiled_step() -> None:
    layer = layers(adapted("inplace")[0])[0]
    layer(torch.zeros(1, layer.in_features))
    layer.restore()
    base = layer.get_base_layer().weight.detach().clone()
    layer(torch.zeros(1, layer.in_features))
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    traced(torch.ones(1, layer.in_features)).sum().backward()
    with torch.no_grad():
        layer.neft_rows["default"].add_(1.0)
    layer.restore()
    assert torch.equal(layer.get_base_layer().weight, base)


@paths
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_trains_as_an_eager_one(path: str) -> None:
    found = []
    for compiling in (False, True):
        peft_model, neurons, inputs = adapted(path)
        logits(peft_model, inputs)
        peft_model(**inputs).loss.backward()
        peft_model.zero_grad()
        for layer in layers(peft_model) if compiling else []:
            layer.compile(fullgraph=True, backend="aot_eager")
        assert any(isinstance(layer, NeftLinear) for layer in layers(peft_model))
        optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            peft_model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(dict(peft_model.base_model.overlay(neurons).values))
        assert differing(state(peft_model.unload()), state(tiny_model())) == []
    assert_near(found[1], found[0], 1e-6)
