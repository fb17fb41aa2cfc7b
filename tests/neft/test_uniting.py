"""Adapters united without training: disjoint ones exactly, shared rows by the policy that is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaForSequenceClassification

from neft import InputError, NeftConfig, NeuronSet, NeuronSpace
from neft.neurons import Kind
from neft.overlay import Change, unite
from tests.neft.helpers import adapted, differing, draw, jitter, layers, logits, state, train
from tests.tiny import batch, tiny_model

#: The base's row p is (10 p, 10 p + 1); rows 1 and 4 belong to several of the changes below.
BASE = torch.tensor([[10.0 * row, 10.0 * row + 1] for row in range(6)])


def change(positions: Sequence[int], *rows: Sequence[float], weight: float = 1.0) -> Change:
    return Change(torch.tensor(positions), torch.tensor(rows), weight)


def united(shared: Any, *changes: Change) -> dict[int, list[float]]:
    positions, rows = unite(changes, shared, lambda index: BASE[index])
    assert positions.tolist() == sorted(set(positions.tolist()))
    return dict(zip(positions.tolist(), rows.tolist(), strict=True))


# --- hand-computed ---

FIRST = change([4, 1], [42.0, 40.0], [16.0, 11.0])
SECOND = change([1, 3], [10.0, 17.0], [33.0, 30.0])
THIRD = change([1], [13.0, 8.0])


@pytest.mark.parametrize(("shared", "row"), [("last", [13.0, 8.0]), ("mean", [13.0, 12.0]), ("sum", [19.0, 14.0])])
def test_shared_rows_follow_the_policy_and_the_others_are_taken_over(shared: str, row: list[float]) -> None:
    """Row 1 is (10, 11) in the base and changes by (6, 0), (0, 6) and (3, -3)."""
    assert united(shared, FIRST, SECOND, THIRD) == {1: row, 3: [33.0, 30.0], 4: [42.0, 40.0]}


def test_the_last_one_is_the_last_that_was_named() -> None:
    assert united("last", THIRD, SECOND, FIRST)[1] == [16.0, 11.0]
    assert united("mean", THIRD, SECOND, FIRST) == united("mean", FIRST, SECOND, THIRD)


def test_shared_rows_are_an_error_where_no_policy_is_named() -> None:
    with pytest.raises(InputError, match="1 rows belong to several; name what becomes of them: last, mean or sum"):
        united("error", FIRST, SECOND, THIRD)
    assert united("error", FIRST, change([0], [1.0, 2.0])) == {0: [1.0, 2.0], 1: [16.0, 11.0], 4: [42.0, 40.0]}


@pytest.mark.parametrize(("shared", "row"), [("last", [10.0, 29.0]), ("mean", [8.5, 20.0]), ("sum", [7.0, 29.0])])
def test_a_weight_scales_what_a_change_makes_of_the_base(shared: str, row: list[float]) -> None:
    """Row 1 changes by -1/2 (6, 0) and 3 (0, 6); row 4 by -1/2 (2, -1), row 3 by 3 (3, -1)."""
    half = Change(FIRST.positions, FIRST.rows, -0.5)
    triple = Change(SECOND.positions, SECOND.rows, 3.0)
    assert united(shared, half, triple) == {1: row, 3: [39.0, 28.0], 4: [39.0, 41.5]}


def test_a_weight_of_nought_gives_the_base_back() -> None:
    assert united("error", Change(FIRST.positions, FIRST.rows, 0.0)) == {1: [10.0, 11.0], 4: [40.0, 41.0]}


def test_what_cannot_be_held_exactly_with_the_base_beside_it_is_still_taken_over() -> None:
    tiny = change([2], [1e-30, -1e-30])
    assert united("sum", tiny, FIRST)[2] == tiny.rows[0].tolist()


# --- adapters of a model ---


def several(
    path: str, *sets: NeuronSet, family: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[PeftModel, list[str]]:
    """A model with an adapter for every set, all moved; the first is active."""
    names = ["default", *(f"task{number}" for number in range(1, len(sets)))]
    peft_model = get_peft_model(tiny_model(family).to(dtype), NeftConfig.from_neurons(sets[0], path=path))
    for name, neurons in zip(names[1:], sets[1:], strict=True):
        peft_model.add_adapter(name, NeftConfig.from_neurons(neurons, path=path))
    for seed, name in enumerate(names):
        jitter(peft_model, name, seed)
    return peft_model.eval(), names


def sets_of(family: str, *, disjoint: bool, kinds: Sequence[Kind] = ("ffn", "attention")) -> list[NeuronSet]:
    space = NeuronSpace.from_model(tiny_model(family), kinds)
    steps = ([(0, 12, 3), (1, 12, 3), (2, 12, 3)]) if disjoint else ([(0, 4), (2, 6), (3, 9)])
    return [
        NeuronSet(space, {site.name: range(*step) for site in space.sites[place:]}) for place, step in enumerate(steps)
    ]


@pytest.mark.parametrize("path", ["inplace", "side"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disjoint_adapters_unite_exactly(path: str, family: str, dtype: torch.dtype) -> None:
    sets = sets_of(family, disjoint=True)
    peft_model, names = several(path, *sets, family=family, dtype=dtype)
    inputs = batch(tiny_model(family))
    before = logits(peft_model, inputs)
    peft_model.base_model.add_weighted_adapter(names, "united")
    # The active one stays so, and trainable; the new one is neither.
    assert peft_model.active_adapters == ["default"]
    assert torch.equal(logits(peft_model, inputs), before)
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in peft_model.named_parameters() if name.endswith("neft_rows.default")}
    plain = tiny_model(family).to(dtype)
    for name, neurons in zip(names, sets, strict=True):
        peft_model.base_model.overlay(neurons, name).lay_on(plain)
    whole = sets[0] | sets[1] | sets[2]
    overlay = peft_model.base_model.overlay(whole, "united")
    for layer in layers(peft_model):
        for name in names:
            if name in layer.neft_rows:
                place = torch.searchsorted(layer.neft_positions["united"], layer.neft_positions[name])
                assert torch.equal(layer.neft_rows["united"][place], layer.neft_rows[name])
    peft_model.set_adapter("united")
    expected = logits(plain, inputs)
    assert not torch.equal(expected, before)
    if path == "inplace":
        assert torch.equal(logits(peft_model, inputs), expected)
    laid = tiny_model(family).to(dtype)
    overlay.lay_on(laid)
    assert differing(state(laid), state(plain)) == []
    assert differing(state(peft_model.merge_and_unload()), state(plain)) == []


@pytest.mark.parametrize("path", ["inplace", "side"])
@pytest.mark.parametrize("shared", ["last", "mean", "sum"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shared_neurons_follow_the_policy(path: str, shared: Any, family: str) -> None:
    weights = [1.0, 0.5, -2.0]
    sets = sets_of(family, disjoint=False)
    peft_model, names = several(path, *sets, family=family)
    inputs = batch(tiny_model(family))
    # Rows that lie in the base now are not the base's.
    logits(peft_model, inputs)
    peft_model.base_model.add_weighted_adapter(names, "united", weights, combination_type=shared)
    base = tiny_model(family)
    shares = []
    for name, rows in (sets[0] | sets[1] | sets[2]).rows().items():
        layer = peft_model.get_base_model().get_submodule(name)
        weight = base.get_submodule(name).weight.detach()
        by_neuron = weight if (rows.side == "row") != (family == "gpt2") else weight.T
        assert layer.neft_positions["united"].tolist() == rows.positions.tolist()
        for position, row in zip(rows.positions.tolist(), layer.neft_rows["united"], strict=True):
            changes = [
                factor
                * (layer.neft_rows[each][layer.neft_positions[each].tolist().index(position)] - by_neuron[position])
                for each, factor in zip(names, weights, strict=True)
                if each in layer.neft_rows and position in layer.neft_positions[each].tolist()
            ]
            shares.append(len(changes))
            total = {"last": changes[-1], "mean": sum(changes) / len(changes), "sum": sum(changes)}[shared]
            torch.testing.assert_close(row, by_neuron[position] + total, rtol=1e-5, atol=1e-6)
    assert {1, 2, 3} == set(shares)


def test_a_united_adapter_is_saved_loaded_and_trained(tmp_path: Path) -> None:
    sets = sets_of("llama", disjoint=False)
    peft_model, names = several("side", *sets)
    peft_model.base_model.add_weighted_adapter(names, "united", combination_type="mean")
    peft_model.set_adapter("united")
    inputs = batch(tiny_model())
    expected = logits(peft_model, inputs)
    peft_model.save_pretrained(tmp_path, selected_adapters=["united"])
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "united", is_trainable=True)
    assert torch.equal(logits(loaded, inputs), expected)
    assert loaded.peft_config["default"].space == sets[0].space.fingerprint
    assert loaded.base_model.overlay(sets[0] | sets[1] | sets[2]).neurons == sets[0] | sets[1] | sets[2]
    saved = get_peft_model_state_dict(peft_model, adapter_name="united")
    assert differing(saved, get_peft_model_state_dict(loaded)) == []
    for model in (peft_model, loaded):
        train(model, inputs)
    assert torch.equal(logits(loaded, inputs), logits(peft_model, inputs))
    assert not torch.equal(logits(loaded, inputs), expected)


def test_a_united_adapter_is_its_own() -> None:
    peft_model, names = several("inplace", *sets_of("llama", disjoint=True))
    peft_model.base_model.add_weighted_adapter(names, "united")
    peft_model.set_adapter("united")
    inputs = batch(tiny_model())
    expected = logits(peft_model, inputs)
    for name in names:
        jitter(peft_model, name, seed=7)
    assert torch.equal(logits(peft_model, inputs), expected)
    for name in names:
        peft_model.delete_adapter(name)
    assert torch.equal(logits(peft_model, inputs), expected)


def test_adapters_of_other_kinds_of_neurons_can_be_united() -> None:
    """Their spaces differ, so the united one belongs to neither."""
    model = tiny_model()
    first, second = (draw(NeuronSpace.from_model(model, [kind])) for kind in ("ffn", "attention"))
    peft_model, names = several("inplace", first, second)
    peft_model.base_model.add_weighted_adapter(names, "united")
    assert peft_model.peft_config["united"].space is None
    assert peft_model.peft_config["default"].space == first.space.fingerprint
    peft_model.set_adapter("united")
    both = tiny_model()
    peft_model.base_model.overlay(first).lay_on(both)
    peft_model.base_model.overlay(second, "task1").lay_on(both)
    assert torch.equal(logits(peft_model, batch(both)), logits(both, batch(both)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": []}, "0 weights for 0 adapters; give at least one"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"adapters": ["default", "task2"]}, "unknown adapter 'task2'; did you mean 'task1'"),
        ({"adapter_name": "task1"}, "there is an adapter 'task1' already; choose another name"),
        ({"combination_type": "men"}, "unknown combination_type 'men'; did you mean 'mean'"),
        ({}, r"module 'model\.layers\.0\.mlp\.gate_proj': \d rows belong to several"),
    ],
)
def test_what_cannot_be_united_is_refused_and_leaves_nothing(options: dict[str, Any], message: str) -> None:
    sets = sets_of("llama", disjoint=False, kinds=["ffn"])
    peft_model, names = several("inplace", sets[0], sets[0])
    before = list(peft_model.state_dict())
    with pytest.raises(InputError, match=message):
        peft_model.base_model.add_weighted_adapter(**{"adapters": names, "adapter_name": "united", **options})
    assert sorted(peft_model.peft_config) == sorted(names)
    assert list(peft_model.state_dict()) == before


def test_rows_and_columns_of_one_matrix_are_not_united() -> None:
    model = tiny_model()
    space = NeuronSpace.from_model(model, ["ffn_in"])
    peft_model = get_peft_model(model, NeftConfig.from_neurons(NeuronSet(space, {"model.layers.0.ffn_in": [1]})))
    up = "model.layers.0.mlp.up_proj"
    peft_model.add_adapter("other", NeftConfig(columns={up: 2}))
    peft_model.get_base_model().get_submodule(up).neft_positions["other"].copy_(torch.tensor([3, 4]))
    with pytest.raises(InputError, match=f"module '{up}': some of the adapters train its rows and some its columns"):
        peft_model.base_model.add_weighted_adapter(["default", "other"], "united")


def test_merged_adapters_are_not_united() -> None:
    peft_model, _, inputs = adapted()
    peft_model.merge_adapter()
    with pytest.raises(InputError, match=r"while some are merged; call unmerge_adapter\(\) first"):
        peft_model.base_model.add_weighted_adapter(["default"], "twice", [2.0])
    peft_model.unmerge_adapter()
    peft_model.base_model.add_weighted_adapter(["default"], "same", [1.0])
    expected = logits(peft_model, inputs)
    peft_model.set_adapter("same")
    assert torch.equal(logits(peft_model, inputs), expected)


def test_modules_trained_whole_are_not_united() -> None:
    base = LlamaForSequenceClassification(tiny_model().config)
    neurons = draw(NeuronSpace.from_model(base))
    peft_model = get_peft_model(base, NeftConfig.from_neurons(neurons, modules_to_save=["score"]))
    with pytest.raises(InputError, match="adapter 'default' has modules_to_save"):
        peft_model.base_model.add_weighted_adapter(["default"], "united")
