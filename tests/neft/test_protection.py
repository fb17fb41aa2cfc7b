"""Protection: which neurons each policy leaves to a new task."""

from __future__ import annotations

import pytest

from neft.errors import InputError
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection import POLICIES, Learnt
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def space() -> NeuronSpace:
    return NeuronSpace.from_model(tiny_model())


def owned(space: NeuronSpace, *ranges: range) -> list[Learnt]:
    """Earlier tasks that own these neurons of the first site."""
    name = space.sites[0].name
    return [Learnt(f"task{place}", NeuronSet(space, {name: each})) for place, each in enumerate(ranges)]


#: Policy, earlier tasks' neurons of the first site (of 64), and which of that site are free.
MATRIX = {
    "exclude": [
        ((), range(64)),
        ((range(10),), range(10, 64)),
        ((range(5), range(3, 60)), range(60, 64)),
        ((range(64),), ()),
    ],
    "none": [((), range(64)), ((range(10),), range(64)), ((range(64), range(64)), range(64))],
}


def test_every_policy_has_its_rows() -> None:
    assert MATRIX.keys() == POLICIES.keys()
    assert all(policy.name == name for name, policy in POLICIES.items())


@pytest.mark.parametrize(
    ("policy", "earlier", "free"), [(policy, *row) for policy, rows in MATRIX.items() for row in rows]
)
def test_what_a_policy_leaves_free(
    space: NeuronSpace, policy: str, earlier: tuple[range, ...], free: range | tuple[()]
) -> None:
    found = POLICIES[policy]().free(space, owned(space, *earlier))
    assert found[space.sites[0].name].tolist() == list(free)
    assert len(found[space.sites[1].name]) == 64
    assert found.space == space


def test_exclude_refuses_neurons_of_another_space(space: NeuronSpace) -> None:
    other = NeuronSpace.from_model(tiny_model("gpt2"))
    with pytest.raises(InputError, match="another neuron space"):
        POLICIES["exclude"]().free(space, owned(other, range(3)))
