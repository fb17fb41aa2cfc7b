"""Neuron spaces and sets: kinds, fingerprints, algebra against Python's sets, files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from neft import InputError, NeftConfig, NeftError, NeuronSet, NeuronSpace
from neft.neurons import Kind, Part, Site
from tests.neft.helpers import draw
from tests.tiny import FAMILIES, tiny_model

SIZES = {"a.ffn": 7, "b.ffn": 300}
SPACE = NeuronSpace(
    tuple(Site(name, "ffn", size, (Part(f"{name}.up", "row", 3),)) for name, size in SIZES.items()), 10_000
)
OTHER = NeuronSpace(SPACE.sites, 10_001)

Neurons = set[tuple[str, int]]
members = st.sets(st.one_of(*(st.tuples(st.just(name), st.integers(0, size - 1)) for name, size in SIZES.items())))


def of(neurons: Neurons) -> NeuronSet:
    return NeuronSet(SPACE, {name: [index for site, index in neurons if site == name] for name in SIZES})


# --- the space ---


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("ffn", "ffn_in"), "share weights"),
        (("ffn_out", "attention", "ffn"), "share weights"),
        ((), "kinds is empty"),
        (("fnn",), "unknown kind of neuron 'fnn'; did you mean 'ffn"),
    ],
)
def test_kinds_that_make_no_sense_are_refused(kinds: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeuronSpace.from_model(tiny_model(), kinds)


def test_sites_come_in_the_order_of_the_modules() -> None:
    space = NeuronSpace.from_model(tiny_model(), ["ffn", "attention"])
    assert [site.name for site in space.sites] == [
        f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("attention", "ffn")
    ]


@pytest.mark.parametrize(
    ("family", "stacks"),
    [
        ("llama", ["model.layers"]),
        ("gpt2", ["transformer.h"]),
        ("gpt_neox", ["gpt_neox.layers"]),
        ("opt", ["model.decoder.layers"]),
        ("bert", ["bert.encoder.layer"]),
        ("t5", ["encoder.block", "decoder.block"]),
    ],
)
def test_a_site_knows_its_stack_and_its_layer(family: str, stacks: list[str]) -> None:
    space = NeuronSpace.from_model(tiny_model(family), ("ffn", "attention"))
    assert list(dict.fromkeys(site.stack for site in space.sites)) == stacks
    for site in space.sites:
        assert site.name.startswith(f"{site.stack}.{site.layer}.")
    assert {(site.stack, site.layer) for site in space.sites} == {
        (stack, layer) for stack in stacks for layer in (0, 1)
    }


def test_a_site_without_a_number_stands_in_layer_0() -> None:
    site = Site("block.ffn", "ffn", 4, (Part("block.down", "column", 4),))
    assert (site.stack, site.layer) == ("", 0)
    assert Site("h.12.ffn2.x1", "ffn", 4, ()).layer == 12


def test_stack_and_layer_are_no_part_of_the_description() -> None:
    site = NeuronSpace.from_model(tiny_model()).to_dict()["sites"][0]
    assert set(site) == {"name", "kind", "size", "parts"}


def test_kinds_may_come_in_any_order_and_twice() -> None:
    model = tiny_model()
    spaces = [NeuronSpace.from_model(model, kinds) for kinds in (("ffn", "qk"), ("qk", "ffn"), ("qk", "ffn", "qk"))]
    assert len({space.fingerprint for space in spaces}) == 1


def test_the_fingerprint_tells_spaces_apart() -> None:
    kinds: tuple[tuple[Kind, ...], ...] = (("ffn",), ("ffn_in",), ("ffn_in", "ffn_out"), ("attention",))
    prints = {NeuronSpace.from_model(tiny_model(family), k).fingerprint for family in FAMILIES for k in kinds}
    # Mistral, Qwen2 and Llama differ in biases and norms alone, which the tiny models' parameter counts show.
    assert len(prints) >= len(kinds) * (len(FAMILIES) - 3)
    assert NeuronSpace.from_model(tiny_model(seed=1)).fingerprint == NeuronSpace.from_model(tiny_model()).fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "t5_gated"])
def test_a_space_survives_its_description(family: str) -> None:
    space = NeuronSpace.from_model(tiny_model(family), ["ffn", "attention", "qk"])
    again = NeuronSpace.from_dict(space.to_dict())
    assert again == space
    assert again.fingerprint == space.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_does_not_change_the_space(family: str) -> None:
    model = tiny_model(family)
    space = NeuronSpace.from_model(model, ["ffn", "attention"])
    peft_model = get_peft_model(model, NeftConfig.from_neurons(draw(space)))
    assert NeuronSpace.from_model(peft_model, ["ffn", "attention"]) == space
    assert NeuronSpace.from_model(peft_model.get_base_model(), ["ffn", "attention"]) == space


def test_a_trained_classifier_does_not_change_the_space() -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForSequenceClassification(config)
    space = NeuronSpace.from_model(model)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(draw(space), task_type=TaskType.SEQ_CLS))
    assert NeuronSpace.from_model(peft_model) == space


def test_tied_weights_count_once() -> None:
    model = tiny_model("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    numbers = {id(tensor): tensor.numel() for _, tensor in model.named_parameters(remove_duplicate=False)}
    assert NeuronSpace.from_model(model).model_parameters == sum(numbers.values())


def test_a_missing_site_is_named() -> None:
    with pytest.raises(InputError, match=r"no site 'a.fnn'.*did you mean 'a.ffn'"):
        SPACE.site("a.fnn")


# --- sets ---


@given(members, members)
def test_algebra_is_that_of_sets(first: Neurons, second: Neurons) -> None:
    a, b = of(first), of(second)
    assert set(a | b) == first | second
    assert set(a & b) == first & second
    assert set(a - b) == first - second
    assert (a == b) is (first == second)
    assert (a.fingerprint == b.fingerprint) is (first == second)
    assert len(a) == len(first) == len(list(a))
    assert hash(a | b) == hash(b | a)


@given(members, members)
def test_overlap_is_intersection_over_union(first: Neurons, second: Neurons) -> None:
    expected = len(first & second) / len(first | second) if first | second else 1.0
    assert of(first).iou(of(second)) == expected


@given(members)
def test_fractions_count_neurons_and_parameters(neurons: Neurons) -> None:
    chosen = of(neurons)
    assert chosen.fraction == len(neurons) / 307
    assert chosen.parameters == 3 * len(neurons)
    assert chosen.parameter_fraction == 3 * len(neurons) / 10_000


@given(members)
def test_indices_are_sorted_unique_and_without_empty_sites(neurons: Neurons) -> None:
    chosen = of(neurons)
    assert list(chosen.indices) == [name for name in SIZES if any(site == name for site, _ in neurons)]
    for name, values in chosen.indices.items():
        assert values.dtype == np.int64
        assert values.tolist() == sorted(index for site, index in neurons if site == name)
        assert np.array_equal(chosen[name], values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members)
def test_a_set_comes_back_from_its_file(tmp_path: Path, neurons: Neurons) -> None:
    path = tmp_path / "set.safetensors"
    of(neurons).save(path)
    assert NeuronSet.load(path, SPACE) == of(neurons)
    assert NeuronSet.load(path).space == SPACE


@pytest.mark.parametrize("kinds", [("ffn", "attention"), ("ffn_in", "ffn_out", "qk"), ("attention", "qk")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_inherits_its_own_neurons_value(family: str, kinds: tuple[Kind, ...]) -> None:
    """Each neuron by itself says which rows are its own; together they must all be given that neuron's value."""
    space = NeuronSpace.from_model(tiny_model(family), kinds)
    neurons = draw(space, each=7)
    values = {
        site.name: 1000.0 * place + torch.arange(site.size, dtype=torch.float32)
        for place, site in enumerate(space.sites)
    }
    given_, rows = neurons.per_row(values), neurons.rows()
    assert list(given_) == list(rows)
    for module, inherited in given_.items():
        assert inherited.shape == rows[module].positions.shape
    for name, index in neurons:
        for module, own in NeuronSet(space, {name: [index]}).rows().items():
            places = np.searchsorted(rows[module].positions, own.positions)
            assert (given_[module][torch.from_numpy(places)] == values[name][index]).all()


def test_all_and_none() -> None:
    assert len(SPACE.all()) == len(SPACE) == 307
    assert len(SPACE.none()) == 0
    assert SPACE.all() - SPACE.all() == SPACE.none()
    assert SPACE.none().fraction == 0
    assert SPACE.none().rows() == {}


@pytest.mark.parametrize(
    "values",
    [[3, 1, 3], (1, 3), {3, 1}, range(1, 4, 2), np.array([1, 3], dtype=np.uint8), torch.tensor([3, 1])],
    ids=str,
)
def test_indices_are_taken_from_any_collection(values: Any) -> None:
    assert NeuronSet(SPACE, {"a.ffn": values})["a.ffn"].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"a.ffn": [7]}, "neuron 7 is outside site 'a.ffn', which has neurons 0 to 6"),
        ({"a.ffn": [-1, 2]}, "neuron -1 is outside"),
        ({"a.ffn": [0.5]}, "must be integers, not float64"),
        ({"a.ffn": torch.tensor([True, False])}, "must be integers, not bool"),
        ({"c.ffn": [1]}, "no site 'c.ffn'"),
        ({"c.ffn": []}, "no site 'c.ffn'"),
    ],
)
def test_bad_indices_are_refused(indices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeuronSet(SPACE, indices)


@pytest.mark.parametrize(
    "mix",
    [lambda a, b: a | b, lambda a, b: a & b, lambda a, b: a - b, lambda a, b: a.iou(b)],
    ids=["|", "&", "-", "iou"],
)
def test_sets_of_two_spaces_do_not_mix(mix: Callable[[NeuronSet, NeuronSet], Any]) -> None:
    with pytest.raises(InputError, match="another neuron space"):
        mix(SPACE.all(), OTHER.all())
    assert SPACE.all() != OTHER.all()


def test_a_set_is_frozen() -> None:
    chosen = NeuronSet(SPACE, {"a.ffn": [1, 2]})
    before = chosen.fingerprint
    with pytest.raises(ValueError, match="read-only"):
        chosen["a.ffn"][0] = 5
    with pytest.raises(TypeError):
        chosen.indices["a.ffn"] = np.array([5])
    with pytest.raises(AttributeError):
        chosen.space = OTHER
    with pytest.raises(AttributeError):
        chosen.extra = 1
    assert chosen.fingerprint == before


def test_a_set_does_not_follow_the_array_it_was_made_of() -> None:
    values = np.array([1, 2])
    chosen = NeuronSet(SPACE, {"a.ffn": values})
    values[0] = 6
    assert chosen["a.ffn"].tolist() == [1, 2]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda chosen: pickle.loads(pickle.dumps(chosen))])
def test_a_set_can_be_copied_and_pickled(copied: Callable[[NeuronSet], NeuronSet]) -> None:
    chosen = NeuronSet(SPACE, {"a.ffn": [1, 2]})
    assert copied(chosen) == chosen
    assert not copied(chosen)["a.ffn"].flags.writeable


def test_the_same_set_is_the_same_however_it_was_made() -> None:
    one = NeuronSet(SPACE, {"b.ffn": [4], "a.ffn": [1]})
    two = NeuronSet(SPACE, {"a.ffn": np.array([1, 1]), "b.ffn": (4,)})
    assert one == two
    assert len({one, two}) == 1
    assert one != {"a.ffn": [1]}


# --- files ---


def test_a_file_takes_two_bytes_a_neuron(tmp_path: Path) -> None:
    sizes = {}
    for count in (1_000, 60_000):
        space = NeuronSpace((Site("a", "ffn", 65_536, (Part("up", "row", 4),)),), 1 << 20)
        NeuronSet(space, {"a": range(65_536 - count, 65_536)}).save(tmp_path / str(count))
        sizes[count] = (tmp_path / str(count)).stat().st_size
    assert 2 * 59_000 <= sizes[60_000] - sizes[1_000] <= 2 * 59_000 + 64


def test_a_wide_site_keeps_its_large_indices(tmp_path: Path) -> None:
    space = NeuronSpace((Site("a", "ffn", 70_000, (Part("up", "row", 4),)),), 1 << 20)
    chosen = NeuronSet(space, {"a": [0, 65_535, 65_536, 69_999]})
    chosen.save(tmp_path / "wide")
    assert NeuronSet.load(tmp_path / "wide") == chosen


def test_the_same_set_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        NeuronSet(SPACE, {"a.ffn": [1], "b.ffn": [2]}).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_set_of_another_space_is_refused(tmp_path: Path) -> None:
    SPACE.all().save(tmp_path / "set")
    with pytest.raises(InputError, match="another neuron space"):
        NeuronSet.load(tmp_path / "set", OTHER)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_a_damaged_file_gives_one_clear_error_or_a_valid_set(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "set"
    NeuronSet(SPACE, {"a.ffn": [1, 2], "b.ffn": range(50)}).save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = NeuronSet.load(path)
    except NeftError as error:
        assert str(error)
    else:
        assert all(values[-1] < loaded.space.site(name).size for name, values in loaded.indices.items())
