"""Bitmaps: every neuron set comes back from one, and damaged bytes are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap, FrozenBitMap

from neft.errors import FailedError, InputError
from neft.neurons import NeuronSet, NeuronSpace, Part, Site
from registry.bitmaps import Numbering, bitmap_of, neurons_of, read, union_of, written

SIZES = {"model.layers.0.ffn": 64, "model.layers.0.attention": 1, "model.layers.11.ffn": 70_000, "head": 3}
SPACE = NeuronSpace(
    tuple(
        Site(name, "attention" if "attention" in name else "ffn", size, (Part(f"{name}.up", "row", 8),))
        for name, size in SIZES.items()
    ),
    model_parameters=1_000_000,
)
NUMBERING = Numbering.of(SPACE.fingerprint, SPACE.to_dict())

sets = st.fixed_dictionaries({name: st.sets(st.integers(0, size - 1)) for name, size in SIZES.items()}).map(
    lambda indices: NeuronSet(SPACE, indices)
)
quick = settings(deadline=None, max_examples=50)


def numbers_of(neurons: NeuronSet) -> list[int]:
    """The neurons' numbers, counted in a plain loop."""
    found, start = [], 0
    for name, size in SIZES.items():
        found += [start + int(index) for index in neurons[name]]
        start += size
    return found


@quick
@given(neurons=sets)
def test_a_set_comes_back(neurons):
    bitmap = bitmap_of(neurons)
    assert list(bitmap) == numbers_of(neurons)
    again = read(written(bitmap), NUMBERING, "sst2@1")
    assert again == bitmap
    assert neurons_of(again, SPACE, NUMBERING) == neurons
    assert NUMBERING.counts(again) == {name: len(indices) for name, indices in neurons.indices.items()}
    assert {site.name: list(indices) for site, indices in NUMBERING.by_site(again)} == {
        name: list(indices) for name, indices in neurons.indices.items()
    }


@quick
@given(first=sets, second=sets)
def test_sets_and_bitmaps_agree(first, second):
    one, other = bitmap_of(first), bitmap_of(second)
    assert one & other == bitmap_of(first & second)
    assert one | other == bitmap_of(first | second) == union_of([one, other])
    assert one - other == bitmap_of(first - second)
    assert one.intersection_cardinality(other) == len(first & second)


def test_numbers_go_through_the_sites_in_order():
    assert len(NUMBERING) == sum(SIZES.values()) == len(SPACE)
    for site, neuron, number in (
        ("model.layers.0.ffn", 0, 0),
        ("model.layers.0.ffn", 63, 63),
        ("model.layers.0.attention", 0, 64),
        ("model.layers.11.ffn", 0, 65),
        ("head", 2, 70_067),
    ):
        assert NUMBERING.number(site, neuron) == number
        assert NUMBERING.neuron(number) == (site, neuron)
    assert [(site.kind, site.layer) for site in NUMBERING.sites] == [
        ("ffn", 0), ("attention", 0), ("ffn", 11), ("ffn", 0)
    ]  # fmt: skip
    assert union_of([]) == BitMap()


@pytest.mark.parametrize(
    ("site", "neuron", "says"),
    [
        ("model.layers.1.ffn", 0, "no site 'model.layers.1.ffn'.*did you mean"),
        ("head", 3, "neurons 0 to 2, so there is no neuron 3"),
        ("head", -1, "no neuron -1"),
        ("head", 2**70, "no neuron"),
    ],
)
def test_a_neuron_that_is_not_there(site, neuron, says):
    with pytest.raises(InputError, match=says):
        NUMBERING.number(site, neuron)


def test_two_bytes_a_neuron_at_most():
    """Of a 7B model's 352,256 FFN neurons, a tenth, drawn at random."""
    numbers = np.random.default_rng(0).choice(352_256, 35_225, replace=False).astype(np.uint32)
    bitmap = BitMap(numbers)
    bitmap.run_optimize()
    assert len(written(FrozenBitMap(bitmap))) <= 2 * len(numbers)


GOOD = tuple(
    written(bitmap_of(NeuronSet(SPACE, indices)))
    for indices in (
        {},
        {"head": [1]},
        {"model.layers.11.ffn": range(70_000)},
        {"model.layers.11.ffn": np.random.default_rng(0).choice(70_000, 9_000, replace=False)},
    )
)


@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 100, b"\xff" * 100, b"\x80\x04\x95pickle"])
def test_damaged_bytes_are_refused(content):
    with pytest.raises(FailedError, match=r"^the neurons of sst2@1 are damaged.*restore the database"):
        read(content, NUMBERING, "sst2@1")


@pytest.mark.parametrize("good", GOOD)
def test_truncated_bytes_are_refused(good):
    for length in {*range(min(len(good), 40)), len(good) // 2, len(good) - 1}:
        with pytest.raises(FailedError, match="the neurons of sst2@1 are damaged"):
            read(good[:length], NUMBERING, "sst2@1")


def test_a_number_beyond_the_space_is_refused():
    content = written(FrozenBitMap([0, len(NUMBERING)]))
    with pytest.raises(FailedError, match=f"number {len(NUMBERING)} is outside its space of {len(NUMBERING)}"):
        read(content, NUMBERING, "sst2@1")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_bytes_are_a_bitmap_or_refused(data):
    content = bytearray(data.draw(st.sampled_from(GOOD) | st.binary(max_size=100)))
    for place in data.draw(st.lists(st.integers(0, max(0, min(len(content), 300) - 1)), max_size=4)):
        if content:
            content[place] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(content), NUMBERING, "sst2@1")
    except FailedError as error:
        assert "\n" not in str(error)
        return
    numbers = list(found.to_array())
    assert numbers == sorted(set(numbers))
    assert len(numbers) == len(found)
    assert bitmap_of(neurons_of(found, SPACE, NUMBERING)) == found
