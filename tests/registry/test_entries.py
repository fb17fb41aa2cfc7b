"""Entries: recorded once, versioned, found again by name and inputs, never changed."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from sqlalchemy import select
from sqlalchemy.orm import Session

from neft.errors import FailedError, InputError
from neft.neurons import NeuronSpace
from neft.scoring import Scores
from registry import Registry
from registry.schema import EntryRow


@pytest.fixture
def registry(anywhere: Registry) -> Registry:
    """What is tested here holds on each database."""
    return anywhere


def test_a_task_gets_versions_from_one_upwards(registry, pupil):
    entries = [pupil.record(task) for task in ("sst2", "qnli", "sst2", "sst2")]

    assert [entry.reference for entry in entries] == ["sst2@1", "qnli@1", "sst2@2", "sst2@3"]
    assert registry.get("sst2") == entries[3]
    assert registry.get("sst2", 2) == registry.get("sst2@2") == entries[2]
    assert [entry.parent for entry in entries] == [None, "sst2@1", "qnli@1", "sst2@2"]


def test_an_entry_comes_back_as_it_was_recorded(place, registry, pupil):
    scores = Scores(pupil.space, {site.name: torch.rand(site.size) for site in pupil.space.sites})
    new = pupil.learn("sst2", scores=scores, mlflow_run_id="run", prefect_flow_run_id="flow")
    recorded = registry.record(new)

    reopened = place.open()
    entry = reopened.find(new.input_digest)
    assert entry == recorded
    for name in (
        *("task", "stream", "input_digest", "seed", "data_fingerprint", "method", "training", "state_digest"),
        *("metrics", "audit", "versions", "mlflow_run_id", "prefect_flow_run_id"),
    ):
        assert getattr(entry, name) == getattr(new, name), name
    assert entry.base_model.fingerprint == pupil.base
    assert entry.neuron_count == len(new.neurons) == 10
    assert entry.parameter_count == new.overlay.parameters == 10 * 3 * 32
    assert entry.space_fingerprint == pupil.space.fingerprint
    assert entry.created_at.utcoffset().total_seconds() == 0
    assert reopened.neurons(entry) == new.neurons
    loaded = reopened.overlay(entry)
    assert all(torch.equal(loaded.values[name], rows) for name, rows in new.overlay.values.items())
    values = reopened.scores(entry).values
    for name, rows in scores.values.items():
        # Kept as float16 shares of the site's largest.
        assert torch.allclose(values[name], rows, rtol=2**-11, atol=float(rows.abs().max()) * 2**-24)
    reopened.close()


def test_the_same_inputs_are_recorded_once(registry, pupil):
    new = pupil.learn("sst2")
    first = registry.record(new)
    again = registry.record(replace(new, metrics={"accuracy": 0.1}))

    assert again == first
    assert again.metrics == {"accuracy": 0.75}
    assert registry.list() == [first]
    assert registry.find("never seen") is None


def test_list_and_chain(registry, pupil, base, new_pupil):
    first = pupil.record("sst2")
    second = pupil.record("qnli")
    apart = new_pupil(registry, base, step=10).record("sst2", stream="other")

    assert registry.list() == [first, second, apart]
    assert registry.list(stream="demo") == [first, second]
    assert registry.list(task="sst2") == [first, apart]
    assert registry.list(stream="none") == []
    assert registry.chain(second) == [first, second]
    assert registry.chain(apart) == [apart]


def test_to_dict_is_json(pupil):
    shown = json.loads(json.dumps(pupil.record("sst2").to_dict()))
    assert shown["reference"] == "sst2@1"
    assert shown["overlay_file"].keys() == {"name", "sha256", "bytes"}


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("sst", None, "did you mean 'sst2'"),
        ("sst2", 3, "no version 3; its versions are 1 to 1"),
        ("sst2@3", None, "no version 3; its versions are 1 to 1"),
        ("sst2@0", None, "no version 0"),
        ("sst2@newest", None, "no alias 'newest'; it has none"),
        ("sst2@", None, "nothing after '@'; write a version or an alias"),
        ("sst2@1", 2, "disagree"),
        ("'; DROP TABLE entries; --", None, "no task"),
    ],
)
def test_what_cannot_be_found_says_so(registry, pupil, name, version, says):
    pupil.record("sst2")
    with pytest.raises(InputError, match=says):
        registry.get(name, version)
    assert len(registry.list()) == 1


def test_an_empty_registry_says_so(registry):
    with pytest.raises(InputError, match="nothing has been recorded yet"):
        registry.get("sst2")


def test_a_task_of_two_base_models_asks_for_one(registry, pupil, other_base, new_pupil):
    here = pupil.record("sst2")
    other = new_pupil(registry, other_base)
    there = other.record("sst2")

    assert here.version == there.version == 1
    with pytest.raises(InputError, match=f"several base models.*{pupil.base[:12]}.*{other.base[:12]}"):
        registry.get("sst2")
    assert registry.get("sst2", base_model=other.base[:8]) == there
    assert registry.get("sst2@1", base_model=str(pupil.folder)) == here
    with pytest.raises(InputError, match="not learnt on base model 'gpt2'"):
        registry.get("sst2", base_model="gpt2")


def test_a_base_model_is_recorded_once(registry, pupil):
    one = registry.add_base_model("f" * 64, "hub/model", "bfloat16", {"layers": 2}, 10)
    assert registry.add_base_model("f" * 64, "elsewhere", "bfloat16", {"layers": 2}, 10) == one
    assert registry.add_base_model("e" * 64, "hub/model", "bfloat16", {"layers": 2}, 10) != one


def test_bad_entries_are_refused_and_leave_nothing(registry, pupil, other_base, new_pupil):
    new = pupil.learn("sst2")
    with pytest.raises(InputError, match="'a@b'"):
        replace(new, task="a@b")
    with pytest.raises(InputError, match="another neuron set"):
        replace(new, neurons=pupil.space.none())
    attention = NeuronSpace.from_model(pupil.model, ["attention"])
    with pytest.raises(InputError, match="another neuron space"):
        replace(new, scores=Scores(attention, {site.name: torch.rand(site.size) for site in attention.sites}))
    with pytest.raises(InputError, match="metrics"):
        registry.record(replace(new, metrics={"accuracy": float("nan")}))
    with pytest.raises(InputError, match="add_base_model"):
        registry.record(replace(new, base_model="0" * 64))
    with pytest.raises(InputError, match="parent entry 99"):
        registry.record(replace(new, parent=99))
    assert registry.list() == []

    stranger = new_pupil(registry, other_base).record("sst2")
    with pytest.raises(InputError, match="keeps to one base model"):
        registry.record(replace(new, parent=stranger))
    assert registry.list() == [stranger]


def test_an_entry_cannot_be_changed_from_python(registry, pupil):
    entry = pupil.record("sst2")
    with pytest.raises(FrozenInstanceError):
        entry.version = 2

    def change(session: Session) -> None:
        session.scalars(select(EntryRow)).one().stream = "changed"

    def delete(session: Session) -> None:
        session.delete(session.scalars(select(EntryRow)).one())

    for work in (change, delete):
        with pytest.raises(FailedError, match=r"immutable.*record a new version"):
            registry._database.write(work)
    assert registry.list() == [entry]
