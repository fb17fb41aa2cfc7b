"""What the registry proposes: the most alike first, each with its evidence, and only what may be started from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neft.errors import InputError
from neft.neurons import NeuronSet, NeuronSpace
from neft.scoring import Scores
from registry import Registry
from registry.proposals import eligible, propose
from tests.registry.conftest import Pupil


def scores(space: NeuronSpace, seed: int, noise: float = 0.0) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    values = {site.name: torch.rand(site.size, generator=draw) for site in space.sites}
    other = torch.Generator().manual_seed(99)
    return Scores(space, {name: row + noise * torch.rand(len(row), generator=other) for name, row in values.items()})


def best(found: Scores) -> NeuronSet:
    return NeuronSet(found.space, {name: torch.topk(row, 5).indices for name, row in found.values.items()})


def test_a_twin_comes_first_and_what_has_nothing_in_common_last(pupil: Pupil, registry: Registry) -> None:
    inverted = Scores(pupil.space, {name: -row for name, row in scores(pupil.space, 1).values.items()})
    pupil.record("stranger", scores=inverted)
    pupil.record("cousin", scores=scores(pupil.space, 1, noise=2.0))
    pupil.record("twin", scores=scores(pupil.space, 1, noise=0.1))
    pupil.record("mute")
    new = scores(pupil.space, 1)
    found = propose(registry, registry.list(), new, best(new))
    assert [each.entry.task for each in found][:2] == ["twin", "cousin"]
    assert [each.entry.task for each in found if each.correlation is not None] == ["twin", "cousin", "stranger"]
    evidence = {each.entry.task: each.correlation for each in found}
    assert evidence["stranger"] == pytest.approx(-1)
    assert evidence["mute"] is None
    assert all(json.loads(json.dumps(each.to_dict())) == each.to_dict() for each in found)


def test_overlap_is_that_of_the_neurons(pupil: Pupil, registry: Registry) -> None:
    entry = pupil.record("task")
    (found,) = propose(registry, [entry], scores(pupil.space, 1), registry.neurons(entry))
    assert (found.iou, found.correlation, found.distance) == (1.0, None, None)


def test_only_what_was_there_before_the_run_is_eligible(
    pupil: Pupil, new_pupil: Callable[..., Pupil], other_base: Path, registry: Registry
) -> None:
    first = pupil.record("first")
    pupil.record("own", stream="mine")
    new_pupil(registry, other_base).record("elsewhere")
    last = pupil.record("second")
    pupil.record("later")
    found = eligible(registry, "mine", pupil.base, pupil.space, last.id)
    assert [entry.reference for entry in found] == [first.reference, last.reference]


def test_what_only_forgets_is_nothing_to_start_from(pupil: Pupil, registry: Registry) -> None:
    first = pupil.record("first")
    again = pupil.record("first", forgets=first)
    assert eligible(registry, "mine", pupil.base, pupil.space, again.id) == [first]
    assert eligible(registry, "mine", pupil.base, pupil.space, again.id, "first") == [first]


def test_a_named_source_is_its_newest_version_before_the_run(pupil: Pupil, registry: Registry) -> None:
    one, two = pupil.record("task"), pupil.record("task")
    pupil.record("task")
    given = (registry, "mine", pupil.base, pupil.space, two.id)
    assert eligible(*given, "task") == [two]
    assert eligible(*given, "task@1") == [one]
    with pytest.raises(InputError, match=r"^method\.transfer names 'tusk', .*; known: task$"):
        eligible(*given, "tusk")
