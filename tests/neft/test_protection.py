"""Protection: which neurons each policy reserves, and which it leaves to a new task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from neft.audit import state_digest
from neft.errors import FailedError, InputError
from neft.keystone import KeystoneSearch
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection import POLICIES, Learnt
from neft.scoring import Scores
from tests.tiny import KEYSTONE_PROMPTS, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def space() -> NeuronSpace:
    return NeuronSpace.from_model(tiny_model())


def owned(space: NeuronSpace, *ranges: range) -> list[Learnt]:
    """Earlier tasks that own these neurons of the first site."""
    name = space.sites[0].name
    return [Learnt(f"task{place}", NeuronSet(space, {name: each})) for place, each in enumerate(ranges)]


#: Policy, its options, earlier tasks' neurons of the first site (of 64), and which of that site are free, where the
#: first eight are reserved.
MATRIX: list[tuple[str, dict[str, Any], tuple[range, ...], range | tuple[()]]] = [
    ("exclude", {}, (), range(64)),
    ("exclude", {}, (range(10),), range(10, 64)),
    ("exclude", {}, (range(5), range(3, 60)), range(60, 64)),
    ("exclude", {}, (range(64),), ()),
    ("functional", {}, (), range(64)),
    ("functional", {}, (range(10), range(20)), range(20, 64)),
    ("none", {}, (), range(64)),
    ("none", {}, (range(10),), range(64)),
    ("none", {}, (range(64), range(64)), range(64)),
    ("soft", {}, (), range(64)),
    ("soft", {}, (range(10), range(64)), range(64)),
    ("replay", {}, (), range(64)),
    ("replay", {}, (range(10),), range(64)),
    ("replay", {"exclude": True}, (range(10),), range(10, 64)),
    ("distill", {}, (), range(64)),
    ("distill", {}, (range(10), range(64)), range(64)),
    ("keystone", {}, (), range(8, 64)),
    ("keystone", {}, (range(10), range(20)), range(20, 64)),
    ("keystone", {"earlier": "exclude"}, (range(10),), range(10, 64)),
    ("keystone", {"earlier": "none"}, (range(10),), range(8, 64)),
    ("keystone", {"only": True}, (), range(8)),
    ("keystone", {"only": True}, (range(5),), range(8)),
    ("keystone", {"only": True, "earlier": "none"}, (range(5),), range(8)),
    ("keystone", {"only": True, "earlier": "exclude"}, (range(5),), range(5, 8)),
    ("keystone", {"only": True, "earlier": "exclude"}, (range(64),), ()),
]


def test_every_policy_has_its_rows() -> None:
    assert {row[0] for row in MATRIX} == POLICIES.keys()
    assert all(policy.name == name for name, policy in POLICIES.items())


@pytest.mark.parametrize(("policy", "options", "earlier", "free"), MATRIX)
def test_what_a_policy_leaves_free(
    space: NeuronSpace, policy: str, options: dict[str, Any], earlier: tuple[range, ...], free: range | tuple[()]
) -> None:
    reserved = NeuronSet(space, {space.sites[0].name: range(8)})
    scores = Scores(space, {site.name: torch.rand(site.size) for site in space.sites})
    found = POLICIES[policy](**options).candidates(scores, owned(space, *earlier), reserved).free
    assert found[space.sites[0].name].tolist() == list(free)
    assert len(found[space.sites[1].name]) == (0 if options.get("only") else 64)
    assert found.space == space


@pytest.mark.parametrize("policy", ["exclude", "keystone"])
def test_neurons_of_another_space_are_refused(space: NeuronSpace, policy: str) -> None:
    other = NeuronSpace.from_model(tiny_model("gpt2"))
    with pytest.raises(InputError, match="another neuron space"):
        scores = Scores(space, {site.name: torch.rand(site.size) for site in space.sites})
        POLICIES[policy]().candidates(scores, owned(other, range(3)), space.none())


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"keystone"}))
def test_most_policies_reserve_nothing(space: NeuronSpace, policy: str) -> None:
    reserved = POLICIES[policy]().reserve(tiny_model(), tiny_tokenizer(), space)
    assert len(reserved) == 0
    assert reserved.space == space


def test_keystone_reserves_the_models_keystones(space: NeuronSpace, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(yaml.safe_dump(KEYSTONE_PROMPTS, sort_keys=False))
    model, options = tiny_model(), {"prompts": path, "rho": 0.2, "new_tokens": 5}
    before = state_digest(model)
    reserved = POLICIES["keystone"](**options).reserve(model, tiny_tokenizer(), space)
    assert reserved == KeystoneSearch(**options).find(model, tiny_tokenizer(), space).neurons
    assert 0 < len(reserved) < len(space)
    assert state_digest(model) == before
    assert POLICIES["keystone"](only=True, **options).reserve(model, tiny_tokenizer(), space) == reserved


def test_training_keystones_only_needs_some(
    space: NeuronSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neft.keystone import Keystones

    monkeypatch.setattr(Keystones, "neurons", space.none())
    arguments = (tiny_model(), tiny_tokenizer(), space)
    with pytest.raises(FailedError, match=r"no neuron is in the top 0\.01 of every capability.*raise its option rho"):
        POLICIES["keystone"](only=True, new_tokens=1).reserve(*arguments)
    assert len(POLICIES["keystone"](new_tokens=1).reserve(*arguments)) == 0


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        ("keystone", {"only": "yes"}, "option 'only' of 'keystone' is 'yes'; it must be true or false"),
        ("keystone", {"only": 1}, "it must be true or false"),
        ("keystone", {"earlier": "share"}, "option 'earlier' of 'keystone' is 'share'; it must be exclude or none"),
        ("keystone", {"rho": 2}, "option 'rho' of 'keystone' is 2"),
        ("exclude", {"top": 1}, "option 'top' of 'exclude' is 1; it must be a number from 0 to below 1"),
        ("exclude", {"relative": 1}, "option 'relative' of 'exclude' is 1; it must be true or false"),
        ("exclude", {"smoothing": 0}, "option 'smoothing' of 'exclude' is 0; it must be a number above 0"),
        ("exclude", {"when_full": "wait"}, "is 'wait'; it must be error, share or spill"),
        ("replay", {"examples": 0}, "option 'examples' of 'replay' is 0; it must be a whole number above 0"),
        ("replay", {"share": 1}, "option 'share' of 'replay' is 1; it must be a number between 0 and 1"),
        ("replay", {"exclude": "no"}, "option 'exclude' of 'replay' is 'no'; it must be true or false"),
        ("distill", {"weight": 0}, "option 'weight' of 'distill' is 0; it must be a number above 0"),
        ("distill", {"temperature": -1}, "option 'temperature' of 'distill' is -1; it must be a number above 0"),
        ("distill", {"positions": 1.5}, "option 'positions' of 'distill' is 1.5; it must be a whole number above 0"),
    ],
)
def test_a_wrong_option_is_refused(policy: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        POLICIES[policy](**options)
