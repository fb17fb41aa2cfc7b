"""Overlays: laid on and taken off bit for bit, in chains, on the right model only, whole files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from neft import FailedError, InputError, NeftConfig, NeuronSet, NeuronSpace, Overlay
from neft.neurons import KINDS, Kind
from neft.overlay import Layers, all_finite, storage_dim
from tests.neft.helpers import differing, draw, logits, state
from tests.tiny import FAMILIES, batch, tiny_model

UP = "model.layers.0.mlp.up_proj"


def overlay(neurons: NeuronSet, model: Any, seed: int = 0) -> Overlay:
    """Random rows for a set."""
    generator = torch.Generator().manual_seed(seed)
    values = Overlay.read(model, neurons).values
    return Overlay(
        neurons, {name: torch.randn(rows.shape, generator=generator).to(rows.dtype) for name, rows in values.items()}
    )


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def neurons(model: Any) -> NeuronSet:
    return draw(NeuronSpace.from_model(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_laying_on_writes_the_rows_and_nothing_else(family: str, kind: Kind) -> None:
    model = tiny_model(family)
    neurons = draw(NeuronSpace.from_model(model, [kind]))
    before, laid = state(model), overlay(neurons, model)
    replaced = laid.lay_on(model)
    after = state(model)
    rows = neurons.rows()
    assert set(differing(before, after)) == {f"{name}.weight" for name in rows}
    for name, chosen in rows.items():
        module = model.get_submodule(name)
        index = torch.from_numpy(chosen.positions.copy())
        dim = storage_dim(module, chosen.side)
        there = module.weight.index_select(dim, index)
        assert torch.equal(there if dim == 0 else there.T, laid.values[name])
        restored = after[f"{name}.weight"].index_copy(dim, index, before[f"{name}.weight"].index_select(dim, index))
        assert torch.equal(restored, before[f"{name}.weight"])
    replaced.lay_on(model)
    assert differing(before, state(model)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    neurons = draw(NeuronSpace.from_model(model))
    before = state(model)
    laid = overlay(neurons, model)
    replaced = laid.lay_on(model)
    assert replaced.values[UP].dtype == dtype
    assert torch.equal(Overlay.read(model, neurons).values[UP], laid.values[UP])
    replaced.lay_on(model)
    assert differing(before, state(model)) == []


def test_zeros_and_signs_come_back_bit_for_bit(model: Any, neurons: NeuronSet) -> None:
    with torch.no_grad():
        model.get_submodule(UP).weight.fill_(-0.0)
    replaced = overlay(neurons, model).lay_on(model)
    replaced.lay_on(model)
    assert torch.signbit(model.get_submodule(UP).weight).all()


def test_a_chain_of_overlapping_overlays_gives_back_every_state(model: Any) -> None:
    space = NeuronSpace.from_model(model, ["ffn", "attention"])
    states, replaced = [state(model)], []
    for seed in range(4):
        replaced.append(overlay(draw(space, each=12, seed=seed), model, seed).lay_on(model))
        states.append(state(model))
    assert len({str(sorted(differing(states[0], later))) for later in states}) > 1
    for undo, expected in zip(reversed(replaced), reversed(states[:-1]), strict=True):
        undo.lay_on(model)
        assert differing(expected, state(model)) == []


def test_the_latest_overlay_wins_where_two_meet(model: Any) -> None:
    space = NeuronSpace.from_model(model)
    first = overlay(NeuronSet(space, {"model.layers.0.ffn": [1, 2]}), model, 1)
    second = overlay(NeuronSet(space, {"model.layers.0.ffn": [2, 3]}), model, 2)
    first.lay_on(model)
    second.lay_on(model)
    weight = model.get_submodule(UP).weight
    assert torch.equal(weight[1], first.values[UP][0])
    assert torch.equal(weight[2:4], second.values[UP])


@pytest.mark.parametrize("kinds", [("ffn",), ("ffn_in", "ffn_out"), ("ffn", "attention"), ("qk", "attention")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_layers_are_the_chain_laid_on_at_once(family: str, kinds: tuple[Kind, ...]) -> None:
    model, other = tiny_model(family), tiny_model(family)
    space = NeuronSpace.from_model(model, kinds)
    chain = [overlay(draw(space, seed=seed), model, seed) for seed in range(4)]
    before = state(model)
    for each in chain:
        each.lay_on(other)
    layers = Layers(model, chain)
    for name in layers.weights.values():
        layers.lay_on(name)
    assert differing(state(model), state(other)) == []
    assert differing(state(model), before) != []
    layers.take_off()
    assert differing(state(model), before) == []


def test_layers_of_another_model_are_refused_untouched(model: Any, neurons: NeuronSet) -> None:
    narrow = overlay(neurons, model)
    cut = Overlay(neurons, {name: rows[:, :-1] for name, rows in narrow.values.items()})
    before = state(model)
    with pytest.raises(InputError, match="trained on another model"):
        Layers(model, [narrow, cut])
    assert differing(state(model), before) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_finite(value: float, dtype: torch.dtype) -> None:
    rows = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(rows)  # though their sum is not
    assert all_finite(-torch.eye(64, dtype=dtype))
    rows[3, 5] = value
    assert not all_finite(rows)
    rows[3, 6] = -value
    assert not all_finite(rows)


def test_an_overlay_comes_back_from_its_file(model: Any, neurons: NeuronSet, tmp_path: Path) -> None:
    laid = overlay(neurons, model)
    laid.save(tmp_path / "overlay")
    again = Overlay.load(tmp_path / "overlay")
    assert again.neurons == neurons
    assert again.values.keys() == laid.values.keys()
    assert all(torch.equal(again.values[name], rows) for name, rows in laid.values.items())
    assert again.parameters == laid.parameters == neurons.parameters
    expected = logits(model, batch(model))
    again.lay_on(model)
    assert not torch.equal(logits(model, batch(model)), expected)


def test_a_file_holds_the_rows_and_little_more(model: Any, neurons: NeuronSet, tmp_path: Path) -> None:
    overlay(neurons, model).save(tmp_path / "overlay")
    held = sum(tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "overlay").values())
    assert held == 4 * neurons.parameters + 2 * len(neurons)


def test_an_overlay_is_frozen(model: Any, neurons: NeuronSet) -> None:
    laid = overlay(neurons, model)
    with pytest.raises(TypeError):
        laid.values[UP] = torch.zeros(1)
    with pytest.raises(AttributeError):
        laid.neurons = neurons.space.none()


def test_reading_copies(model: Any, neurons: NeuronSet) -> None:
    read = Overlay.read(model, neurons)
    before = {name: rows.clone() for name, rows in read.values.items()}
    overlay(neurons, model).lay_on(model)
    assert all(torch.equal(read.values[name], rows) for name, rows in before.items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model("gpt2"), "has no module 'model.layers.0.mlp.gate_proj'"),
        (lambda: resized(hidden_size=48), r"are \(5, 32\), the model's \(5, 48\): it was trained on another model"),
        (lambda: resized(intermediate_size=8), r"has 8 rows, but the neurons own row \d+: they belong to another"),
    ],
    ids=["family", "width", "neurons"],
)
def test_another_model_is_refused_untouched(neurons: NeuronSet, model: Any, other: Any, message: str) -> None:
    laid, target = overlay(neurons, model), other()
    before = state(target)
    with pytest.raises(InputError, match=message):
        laid.lay_on(target)
    assert differing(before, state(target)) == []


def resized(**sizes: int) -> Any:
    """A Llama whose first layer is as the tiny model's, so that what does not fit comes late."""
    config = tiny_model().config
    plain, changed = type(config)(**config.to_dict()), type(config)(**{**config.to_dict(), **sizes})
    model, other = type(tiny_model())(plain), type(tiny_model())(changed)
    model.model.layers[1] = other.model.layers[1]
    return model


def test_a_model_with_an_adapter_is_refused(model: Any, neurons: NeuronSet) -> None:
    laid = overlay(neurons, model)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons))
    with pytest.raises(InputError, match="has an adapter in it"):
        laid.lay_on(peft_model.get_base_model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop(UP), f"disagree on modules: {UP}"),
        (lambda values: values.update(extra=torch.zeros(1, 1)), "disagree on modules: extra"),
        (lambda values: values.update({UP: values[UP][:-1]}), "overlay has 4 rows .* its neuron set 5"),
    ],
)
def test_rows_that_are_not_the_sets_are_refused(model: Any, neurons: NeuronSet, change: Any, message: str) -> None:
    values = dict(Overlay.read(model, neurons).values)
    change(values)
    with pytest.raises(InputError, match=message):
        Overlay(neurons, values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_that_is_not_finite_is_refused(model: Any, neurons: NeuronSet, tmp_path: Path, value: float) -> None:
    values = dict(Overlay.read(model, neurons).values)
    values[UP][0, 0] = value
    Overlay(neurons, values).save(tmp_path / "overlay")
    with pytest.raises(FailedError, match=f"not finite, in module '{UP}'"):
        Overlay.load(tmp_path / "overlay")


def test_a_single_flipped_bit_in_a_file_is_noticed(model: Any, neurons: NeuronSet, tmp_path: Path) -> None:
    path = tmp_path / "overlay"
    overlay(neurons, model).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FailedError, match="is corrupt"):
        Overlay.load(path)


def test_a_neuron_set_is_no_overlay(neurons: NeuronSet, tmp_path: Path) -> None:
    neurons.save(tmp_path / "set")
    with pytest.raises(InputError, match="is a 'neft-neuron-set', not a 'neft-overlay'"):
        Overlay.load(tmp_path / "set")
