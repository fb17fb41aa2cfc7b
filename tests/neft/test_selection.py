"""Selection: the best neurons that a budget pays for, against a brute-force reference; and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from neft.errors import FailedError, InputError
from neft.neurons import NeuronSet, NeuronSpace, Part, Site
from neft.scoring import Scores
from neft.selection import Budget, Lent, Selection, SelectionSpec, WhenFull, select

GLOBAL, PER_SITE = SelectionSpec(scope="global"), SelectionSpec(scope="per_site")


def space_of(*sites: tuple[int, int], outside: int = 1000) -> NeuronSpace:
    """A space of sites of (size, parameters of a neuron), in a model with `outside` parameters besides."""
    made = tuple(
        Site(f"layers.{place}.ffn", "ffn", size, (Part(f"layers.{place}.down", "column", width),))
        for place, (size, width) in enumerate(sites)
    )
    return NeuronSpace(made, outside + sum(size * width for size, width in sites))


def scored(space: NeuronSpace, *values: Sequence[float]) -> Scores:
    return Scores(space, {site.name: torch.tensor(each) for site, each in zip(space.sites, values, strict=True)})


def chosen(selection: Selection) -> list[list[int]]:
    return [selection.neurons[site.name].tolist() for site in selection.neurons.space.sites]


# Against a reference


@st.composite
def problems(draw: st.DrawFn) -> tuple[Scores, NeuronSet]:
    """Scores with many ties, and a set of free neurons."""
    space = space_of(*draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 5)), min_size=1, max_size=4)))
    values = [draw(st.lists(st.integers(0, 3), min_size=site.size, max_size=site.size)) for site in space.sites]
    free = {site.name: draw(st.sets(st.integers(0, site.size - 1))) for site in space.sites}
    scores = scored(space, *[[float(value) for value in each] for each in values])
    return scores, space.all() if draw(st.booleans()) else NeuronSet(space, free)


def best(scores: Scores, free: NeuronSet, sites: Sequence[Site], limit: int, budget: Budget) -> list[tuple[int, int]]:
    """(site, neuron) one by one from the best down, while the next one fits."""
    space = scores.space
    ranked = sorted(
        (-float(scores.values[site.name][neuron]), space.sites.index(site), int(neuron))
        for site in sites
        for neuron in free[site.name]
    )
    taken, spent = [], 0
    for _, place, neuron in ranked:
        spent += budget.cost(space.sites[place])
        if spent > limit:
            break
        taken.append((place, neuron))
    return taken


def largest_remainder(total: int, weights: Sequence[int]) -> list[int]:
    exact = [Fraction(total * weight, sum(weights)) for weight in weights]
    shares = [int(each) for each in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: (shares[place] - exact[place], place))
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares


@settings(max_examples=200, deadline=None)
@given(
    problem=problems(), amount=st.integers(1, 40), unit=st.sampled_from(["neurons", "parameters"]), spread=st.booleans()
)
def test_selection_equals_brute_force(problem: tuple[Scores, NeuronSet], amount: int, unit: str, spread: bool) -> None:
    scores, free = problem
    space, budget = scores.space, Budget.model_validate({unit: amount})
    sites = space.sites
    if spread:
        weights = [site.size * budget.cost(site) for site in sites]
        groups = list(zip([[site] for site in sites], largest_remainder(amount, weights), strict=True))
    else:
        groups = [(list(sites), amount)]
    short = any(sum(len(free[site.name]) * budget.cost(site) for site in group) < limit for group, limit in groups)
    expected = [pair for group, limit in groups for pair in best(scores, free, group, limit, budget)]
    spec = PER_SITE if spread else GLOBAL
    if amount > sum(site.size * budget.cost(site) for site in sites):
        with pytest.raises(InputError, match="but the model has"):
            select(scores, budget, spec, free)
    elif short:
        with pytest.raises(FailedError, match="are free"):
            select(scores, budget, spec, free)
    elif not expected:
        with pytest.raises(FailedError, match="too small"):
            select(scores, budget, spec, free)
    else:
        neurons = select(scores, budget, spec, free).neurons
        assert {(sites.index(space.site(name)), neuron) for name, neuron in neurons} == set(expected)
        assert not neurons - free
        if unit == "neurons":
            assert len(neurons) == amount
        else:
            assert 0 < neurons.parameters <= amount


# By hand


def test_global_scope_is_one_ranking_and_per_site_gives_every_layer_its_share() -> None:
    scores = scored(space_of((4, 3), (4, 3)), [1.0, 2, 3, 4], [5.0, 8, 7, 6])
    assert chosen(select(scores, Budget(neurons=4), GLOBAL)) == [[], [0, 1, 2, 3]]
    assert chosen(select(scores, Budget(neurons=4), PER_SITE)) == [[2, 3], [1, 2]]


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (5, (10, 10), [3, 2]),  # 2.5 and 2.5: the tie goes to the earlier site
        (10, (50, 30, 20), [5, 3, 2]),
        (7, (10, 20, 30), [1, 2, 4]),  # 1.17, 2.33, 3.5: the largest remainder is the last's
        (1, (10, 30), [0, 1]),
    ],
)
def test_shares_by_largest_remainder(total: int, sizes: tuple[int, ...], shares: list[int]) -> None:
    scores = scored(space_of(*[(size, 2) for size in sizes]), *[torch.rand(size).tolist() for size in sizes])
    picked = chosen(select(scores, Budget(neurons=total), PER_SITE))
    assert [len(each) for each in picked] == shares


def test_a_fraction_is_of_the_spaces_neurons_or_of_the_models_parameters() -> None:
    space = space_of((20, 3), (20, 3), outside=280)  # 40 neurons, 120 of 400 parameters in them
    scores = scored(space, torch.rand(20).tolist(), torch.rand(20).tolist())
    assert len(select(scores, Budget(neurons=0.1), GLOBAL).neurons) == 4
    assert select(scores, Budget(parameters=0.1), GLOBAL).neurons.parameters == 39  # 40 would need a third of a neuron
    assert Budget(neurons=0.01).total(space_of((3, 1))) == 1


def test_a_bare_number_is_of_neurons() -> None:
    assert Budget.model_validate(0.25) == Budget(neurons=0.25)
    assert Budget.model_validate(12) == Budget(neurons=12)
    assert Budget.model_validate({"parameters": 0.09}) == Budget(parameters=0.09)


@pytest.mark.parametrize(
    ("lowest", "layers"),
    [(0, [0, 1, 2, 3, 4]), (3, [3, 4]), (4, [4]), (0.0, [0, 1, 2, 3, 4]), (0.5, [3, 4]), (0.4, [2, 3, 4]), (0.8, [4])],
)
def test_lower_layers_are_left_out_by_number_or_fraction(lowest: float, layers: list[int]) -> None:
    space = space_of(*[(4, 1)] * 5)
    scores = scored(space, *[[4.0 - place] * 4 for place in range(5)])
    for scope in ("global", "per_site"):
        spec = SelectionSpec.model_validate({"scope": scope, "lowest_layer": lowest})
        assert [site.layer for site in spec.sites(space)] == layers
        selection = select(scores, Budget(neurons=len(layers)), spec)
        assert {space.site(name).layer for name in selection.neurons.indices} <= set(layers)
        assert selection.free == 4 * len(layers)
        assert len(selection.neurons) == len(layers)


@pytest.mark.parametrize("layer", range(30))
def test_a_fraction_of_the_depth_is_exact(layer: int) -> None:
    space = space_of(*[(1, 1)] * 30)
    sites = SelectionSpec(lowest_layer=layer / 30).sites(space)
    assert [site.layer for site in sites] == list(range(layer, 30))


def test_the_budget_is_of_the_whole_space_and_spent_among_the_layers_allowed() -> None:
    space = space_of((20, 3), (20, 3), (20, 3), (20, 3), outside=160)  # 80 neurons, 240 of 400 parameters in them
    scores = scored(space, *[torch.rand(20).tolist() for _ in range(4)])
    assert [len(each) for each in chosen(select(scores, Budget(neurons=0.1), PER_SITE))] == [2, 2, 2, 2]
    half = SelectionSpec(lowest_layer=0.5)
    assert [len(each) for each in chosen(select(scores, Budget(neurons=0.1), half))] == [0, 0, 4, 4]
    assert [len(each) for each in chosen(select(scores, Budget(parameters=0.1), half))] == [0, 0, 6, 6]  # 18 + 18 of 40


def test_layers_are_counted_in_each_stack() -> None:
    """An encoder of four layers and a decoder of two, whose layers number their parts too."""
    names = [f"encoder.block.{layer}.layer.1.ffn" for layer in range(4)]
    names += [f"decoder.block.{layer}.layer.2.ffn" for layer in range(2)]
    sites = tuple(Site(name, "ffn", 4, (Part(f"{name}.wo", "column", 1),)) for name in names)
    space = NeuronSpace(sites, 100)
    assert {(site.stack, site.layer) for site in SelectionSpec(lowest_layer=0.5).sites(space)} == {
        ("encoder.block", 2),
        ("encoder.block", 3),
        ("decoder.block", 1),
    }
    assert {site.stack for site in SelectionSpec(lowest_layer=2).sites(space)} == {"encoder.block"}


def test_only_free_neurons_of_the_layers_allowed_are_chosen() -> None:
    scores = scored(space_of((4, 1), (4, 1)), [9.0, 9, 9, 9], [4.0, 3, 2, 1])
    free = scores.space.all() - NeuronSet(scores.space, {"layers.1.ffn": [0]})
    selection = select(scores, Budget(neurons=2), SelectionSpec(lowest_layer=1), free)
    assert chosen(selection) == [[], [1, 2]]
    assert selection.free == 3


def test_threshold_keeps_what_reaches_it_within_the_budget() -> None:
    scores = scored(space_of((5, 1)), [0.1, 0.9, 0.5, 0.5, 0.7])
    selection = select(scores, Budget(neurons=4), SelectionSpec(rule="threshold", threshold=0.5))
    assert chosen(selection) == [[1, 2, 3, 4]]
    assert selection.notes == ()
    stricter = select(scores, Budget(neurons=4), SelectionSpec(rule="threshold", threshold=0.6))
    assert chosen(stricter) == [[1, 4]]
    assert stricter.notes == ("layers.0.ffn: 2 of 4 neurons in budget reach the threshold 0.6",)


def test_ties_at_the_cut_are_said_and_go_to_the_earlier_site_and_index() -> None:
    scores = scored(space_of((3, 1), (3, 1)), [1.0, 2, 1], [1.0, 1, 3])
    selection = select(scores, Budget(neurons=4), GLOBAL)
    assert chosen(selection) == [[0, 1, 2], [2]]
    assert selection.notes == ("the model: 2 neurons tie with the last chosen one (score 1); lower index wins",)
    assert select(scores, Budget(neurons=2), GLOBAL).notes == ()
    assert select(scores, Budget(neurons=4), GLOBAL).neurons == selection.neurons


def test_only_free_neurons_are_chosen() -> None:
    scores = scored(space_of((4, 1)), [4.0, 3, 2, 1])
    free = scores.space.all() - NeuronSet(scores.space, {"layers.0.ffn": [0, 2]})
    assert chosen(select(scores, Budget(neurons=2), free=free)) == [[1, 3]]


# When a site is full


def lent_of(free: NeuronSet, *importance: Sequence[float]) -> Lent:
    """All neurons that are not free, with their importance to earlier tasks."""
    space = free.space
    values = {site.name: torch.tensor(each) for site, each in zip(space.sites, importance, strict=True)}
    return Lent(space.all() - free, values)


def test_what_is_missing_is_shared_the_least_important_first() -> None:
    scores = scored(space_of((6, 1), (4, 1)), [1.0, 2, 3, 4, 5, 6], [1.0, 2, 3, 4])
    free = NeuronSet(scores.space, {"layers.0.ffn": [5], "layers.1.ffn": [0, 1, 2, 3]})
    lent = lent_of(free, [0.5, 0.1, 0.9, 0.2, 0.7, 0.0], [0.0] * 4)
    selection = select(scores, Budget(neurons=5), PER_SITE, free, "share", lent)
    assert chosen(selection) == [[1, 3, 5], [2, 3]]
    assert selection.notes == ("layers.0.ffn is full: 2 neurons that matter least to earlier tasks are shared",)
    assert selection.free == 5
    assert selection.capacity == {"layers.0.ffn": (1, 0), "layers.1.ffn": (4, 2)}


def test_a_full_site_spills_to_the_highest_scored_free_neurons_of_others() -> None:
    scores = scored(space_of((4, 1), (4, 1), (4, 1)), [9.0] * 4, [1.0, 2, 3, 8], [4.0, 5, 6, 7])
    free = scores.space.all() - NeuronSet(scores.space, {"layers.0.ffn": [1, 2, 3]})
    selection = select(scores, Budget(neurons=6), PER_SITE, free, "spill")
    assert chosen(selection) == [[0], [2, 3], [1, 2, 3]]  # the next best after two each are 3 and 5: 5 it is
    assert "1 full sites spill 1 neurons of their share to others" in selection.notes
    assert selection.capacity == {"layers.0.ffn": (1, 0), "layers.1.ffn": (4, 2), "layers.2.ffn": (4, 1)}


@pytest.mark.parametrize("when_full", ["error", "spill", "share"])
def test_a_full_model_is_an_error_unless_neurons_are_lent(when_full: WhenFull) -> None:
    scores = scored(space_of((4, 1), (4, 1)), [4.0, 3, 2, 1], [4.0, 3, 2, 1])
    free = NeuronSet(scores.space, {"layers.0.ffn": [0, 1], "layers.1.ffn": [0]})
    with pytest.raises(FailedError, match="are free"):
        select(scores, Budget(neurons=4), PER_SITE, free, when_full)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), amount=st.integers(1, 20), spread=st.booleans(), data=st.data())
def test_sharing_lends_what_is_missing_and_no_more(
    problem: tuple[Scores, NeuronSet], amount: int, spread: bool, data: st.DataObject
) -> None:
    scores, free = problem
    space = scores.space
    amount = min(amount, len(space))
    importance = [
        data.draw(st.lists(st.integers(0, 3).map(float), min_size=site.size, max_size=site.size))
        for site in space.sites
    ]
    lent = lent_of(free, *importance)
    selection = select(scores, Budget(neurons=amount), PER_SITE if spread else GLOBAL, free, "share", lent)
    shared = selection.neurons - free
    assert len(selection.neurons) == amount
    groups = [[site] for site in space.sites] if spread else [list(space.sites)]
    for group in groups:
        names = {site.name for site in group}
        taken = sorted(lent.importance[name][index] for name, index in shared if name in names)
        offered = sorted(lent.importance[name][index] for name, index in lent.neurons if name in names)
        assert taken == offered[: len(taken)]
        if taken:
            assert all(len((free - selection.neurons)[site.name]) == 0 for site in group)
    assert bool(shared) == any("is full" in note for note in selection.notes)
    check_ledger(selection, free)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), amount=st.integers(1, 20), unit=st.sampled_from(["neurons", "parameters"]))
def test_spilling_keeps_the_budget_and_changes_nothing_where_there_is_room(
    problem: tuple[Scores, NeuronSet], amount: int, unit: str
) -> None:
    scores, free = problem
    space, budget = scores.space, Budget.model_validate({unit: amount})
    costs = {site.name: budget.cost(site) for site in space.sites}
    room = sum(costs[name] for name, _ in free)
    shares = largest_remainder(amount, [site.size * costs[site.name] for site in space.sites])
    if amount > room:
        with pytest.raises((InputError, FailedError)):
            select(scores, budget, PER_SITE, free, "spill")
        return
    fits = all(
        share <= len(free[site.name]) * costs[site.name] for site, share in zip(space.sites, shares, strict=True)
    )
    try:
        selection = select(scores, budget, PER_SITE, free, "spill")
    except FailedError as error:
        # A share in parameters may be too small for one neuron.
        assert unit == "parameters" and ("too small" in str(error) or "are free" in str(error))
        return
    assert not selection.neurons - free
    if unit == "neurons":
        assert len(selection.neurons) == amount
        assert all(
            len(selection.neurons[site.name]) >= min(share, len(free[site.name]))
            for site, share in zip(space.sites, shares, strict=True)
        )
    if fits:
        assert selection == select(scores, budget, PER_SITE, free)
    check_ledger(selection, free)


def check_ledger(selection: Selection, free: NeuronSet) -> None:
    """The ledger counts the free neurons of every site before and after the choice, lent ones on neither side."""
    left = free - selection.neurons
    assert selection.free == len(free)
    assert selection.capacity == {site.name: (len(free[site.name]), len(left[site.name])) for site in free.space.sites}


# Errors


@pytest.mark.parametrize("spec", [GLOBAL, PER_SITE], ids=["global", "per_site"])
def test_too_few_free_neurons_says_how_many_are_free_and_what_can_be_done(spec: SelectionSpec) -> None:
    scores = scored(space_of((4, 1), (4, 1)), [4.0, 3, 2, 1], [4.0, 3, 2, 1])
    free = NeuronSet(scores.space, {"layers.0.ffn": [0, 1, 2], "layers.1.ffn": [3]})
    with pytest.raises(FailedError) as caught:
        select(scores, Budget(neurons=6), spec, free)
    message = str(caught.value)
    where = (
        "asks for 6 neurons in the model, where 4" if spec is GLOBAL else "asks for 3 neurons in layers.1.ffn, where 1"
    )
    assert f"{where} neurons are free" in message
    for remedy in ("lower method.budget", "method.selection.scope", "method.kinds", "method.protection: none"):
        assert remedy in message


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(neurons=9), "method.budget 9 asks for 9 neurons, but the model has 8"),
        (Budget(parameters=25), "asks for 25 parameters in neurons, but the model has 24"),
        (Budget(parameters=0.5), "asks for 512 parameters in neurons, but the model has 24"),
    ],
)
def test_a_budget_larger_than_the_space_is_an_input_error(budget: Budget, words: str) -> None:
    scores = scored(space_of((8, 3)), torch.rand(8).tolist())
    with pytest.raises(InputError, match=words):
        select(scores, budget)


@pytest.mark.parametrize(
    ("amount", "spec", "words"),
    [
        ({"parameters": 2}, SelectionSpec(), "too small to pay for a single neuron; raise it"),
        (
            {"neurons": 2},
            SelectionSpec(rule="threshold", threshold=9),
            "threshold 9: the best free one scores 3; lower",
        ),
        ({"parameters": 2}, SelectionSpec(rule="threshold", threshold=2), "too small to pay for a single neuron"),
    ],
)
def test_an_empty_choice_says_why(amount: dict[str, int], spec: SelectionSpec, words: str) -> None:
    scores = scored(space_of((3, 3)), [1.0, 2, 3])
    with pytest.raises(FailedError, match=words):
        select(scores, Budget.model_validate(amount), spec)


@pytest.mark.parametrize("scope", ["global", "per_site"])
def test_what_the_layers_allowed_cannot_give_is_said(scope: str) -> None:
    scores = scored(space_of((4, 1), (4, 1)), [9.0, 9, 9, 9], [4.0, 3, 2, 1])
    spec = SelectionSpec.model_validate({"scope": scope, "lowest_layer": 1})
    with pytest.raises(
        InputError, match=r"has 4 of the chosen kinds in the layers from method\.selection\.lowest_layer up"
    ):
        select(scores, Budget(neurons=5), spec)
    free = NeuronSet(scores.space, {"layers.0.ffn": range(4), "layers.1.ffn": [0]})
    with pytest.raises(FailedError, match=r"where 1 neurons are free.*lower method\.selection\.lowest_layer \(now 1\)"):
        select(scores, Budget(neurons=2), spec, free)
    above = SelectionSpec(rule="threshold", threshold=5, lowest_layer=1)
    with pytest.raises(FailedError, match="the best free one scores 4;"):
        select(scores, Budget(neurons=2), above)


def test_a_layer_above_the_highest_is_an_input_error() -> None:
    scores = scored(space_of((4, 1), (4, 1)), [1.0] * 4, [1.0] * 4)
    with pytest.raises(InputError, match=r"lowest_layer 2 leaves no layer to choose from; the highest .* is 1"):
        select(scores, Budget(neurons=2), SelectionSpec(lowest_layer=2))


def test_free_neurons_of_another_space_are_refused() -> None:
    scores = scored(space_of((3, 3)), [1.0, 2, 3])
    with pytest.raises(InputError, match="another neuron space"):
        select(scores, Budget(neurons=1), free=space_of((4, 3)).all())


@pytest.mark.parametrize(
    ("model", "value", "words"),
    [
        (Budget, 0.009, "fraction 0.009 is outside 0.01 to 0.5"),
        (Budget, 0.51, "outside 0.01 to 0.5"),
        (Budget, 1.0, "outside 0.01 to 0.5"),
        (Budget, float("nan"), "outside 0.01 to 0.5"),
        (Budget, 0, "count 0 must be at least 1"),
        (Budget, -3, "count -3 must be at least 1"),
        (Budget, True, "True is no budget"),
        (Budget, {"neurons": True}, "is no budget"),
        (Budget, {"neurons": 5, "parameters": 5}, "either `neurons` or `parameters`"),
        (Budget, {}, "either `neurons` or `parameters`"),
        (SelectionSpec, {"rule": "threshold"}, "goes with `rule: threshold`"),
        (SelectionSpec, {"threshold": 0.1}, "goes with `rule: threshold`"),
        (SelectionSpec, {"rule": "best"}, "top_k"),
        *[
            (SelectionSpec, {"lowest_layer": value}, "give a layer's number, from 0 up, or a fraction below 1")
            for value in (-1, 1.0, 1.5, -0.5, float("nan"), True, "0.5", None)
        ],
    ],
)
def test_a_budget_or_rule_out_of_range_is_refused(model: type[BaseModel], value: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        model.model_validate(value)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_the_ends_of_the_range_are_allowed(fraction: float) -> None:
    assert Budget.model_validate(fraction).neurons == fraction
