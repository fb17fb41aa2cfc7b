"""Look-ups on both databases: each answer is computed a second time here, from the neuron sets themselves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neft.errors import FailedError, InputError
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.routing import Signature
from neft.scoring import Scores
from registry import Entry, Registry, index
from registry.index import Held
from registry.lookups import Lineage, Near, Owner
from tests.registry.conftest import Pupil
from tests.tiny import ANIMALS, COLOURS, save_tiny, texts_of


@pytest.fixture
def pupil(anywhere: Registry, base: Path) -> Pupil:
    """A pupil on each database."""
    return Pupil(anywhere, base)


def chosen(pupil: Pupil, first: range, second: range | list[int] = range(0)) -> dict[str, Any]:
    """Fields of an entry that owns these neurons of the two layers."""
    names = [site.name for site in pupil.space.sites]
    return {"neurons": NeuronSet(pupil.space, dict(zip(names, (first, second), strict=True)))}


def drawn(space: NeuronSpace, seed: int, noise: float = 0.0) -> Scores:
    draw, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    return Scores(
        space,
        {
            site.name: torch.rand(site.size, generator=draw) + noise * torch.rand(site.size, generator=other)
            for site in space.sites
        },
    )


def is_json(value: Any) -> bool:
    return json.loads(json.dumps(value)) == json.loads(json.dumps(value, allow_nan=False))


def test_tasks_are_summed_up(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film")
    pupil.record("news", stream="other")
    pupil.record("film", stream="other")
    anywhere.set_alias("film@1", "champion")
    film, news = anywhere.tasks()
    assert (film.name, film.versions, film.newest, film.streams) == ("film", 2, "film@2", ("demo", "other"))
    assert film.aliases == {"champion": 1}
    assert (film.base_model, film.base_model_name) == (pupil.base, str(pupil.folder))
    assert (news.name, news.versions, news.streams, news.aliases) == ("news", 1, ("other",), {})
    assert is_json([film.to_dict(), news.to_dict()])


def test_a_registry_without_entries_answers_with_nothing(anywhere: Registry) -> None:
    assert list(anywhere.tasks()) == []
    assert anywhere.search().entries == ()
    with pytest.raises(InputError, match="nothing has been recorded"):
        anywhere.owners("model.layers.1.ffn", 3)
    with pytest.raises(InputError, match="nothing has been recorded"):
        anywhere.overlaps("demo")


def test_owners_of_a_neuron_and_of_a_site(pupil: Pupil, anywhere: Registry) -> None:
    recorded = [pupil.record(name) for name in ("film", "news", "film", "tweets")]
    sets = {entry.reference: anywhere.neurons(entry) for entry in recorded}
    site = pupil.space.sites[1].name
    for neuron in range(pupil.space.sites[1].size):
        owned = [Owner(name, name.partition("@")[0], 1) for name, each in sets.items() if neuron in each[site]]
        assert list(anywhere.owners(site, neuron)) == owned
    assert list(anywhere.owners(site)) == [Owner(e.reference, e.task, len(sets[e.reference][site])) for e in recorded]


def test_owners_refuses_what_is_not_there(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film")
    site = pupil.space.sites[0].name
    with pytest.raises(InputError, match=f"no site 'model.layers.0.fn'.*did you mean '{site}'"):
        anywhere.owners("model.layers.0.fn", 1)
    for neuron in (64, -1, 10**30):
        with pytest.raises(InputError, match=f"neurons 0 to 63, so there is no neuron {neuron}"):
            anywhere.owners(site, neuron)
    with pytest.raises(InputError, match="no neuron space 'zzz'"):
        anywhere.owners(site, 1, space="zzz")
    with pytest.raises(InputError, match="no base model 'gone'"):
        anywhere.owners(site, 1, base_model="gone")


def test_base_models_of_one_shape_are_told_apart(
    pupil: Pupil, new_pupil: Callable[..., Pupil], other_base: Path, anywhere: Registry
) -> None:
    other = new_pupil(anywhere, other_base)
    mine, theirs = pupil.record("film"), other.record("news", **chosen(other, range(64), range(64)))
    site = pupil.space.sites[0].name
    neuron = int(anywhere.neurons(mine)[site][0])
    with pytest.raises(InputError, match=f"several base models.*{pupil.base[:12]}"):
        anywhere.owners(site, neuron)
    assert [owner.entry for owner in anywhere.owners(site, neuron, base_model=pupil.base[:10])] == ["film@1"]
    assert [owner.entry for owner in anywhere.owners(site, neuron, base_model=str(other_base))] == ["news@1"]
    assert list(anywhere.nearest(mine)) == [] == list(anywhere.nearest(theirs))


def test_overlap_of_two(pupil: Pupil, anywhere: Registry) -> None:
    one = pupil.record("film", **chosen(pupil, range(10), range(4)))
    pupil.record("news", **chosen(pupil, range(6, 20)))
    first, second = (anywhere.neurons(anywhere.get(name)) for name in ("film", "news"))
    found = anywhere.overlap(one, "news@1")
    assert (found.first, found.second) == ("film@1", "news@1")
    assert found.shared == len(first & second) == 4
    assert (found.only_first, found.only_second) == (len(first - second), len(second - first)) == (10, 10)
    assert found.iou == pytest.approx(first.iou(second))
    assert found.sites == {pupil.space.sites[0].name: 4}
    assert anywhere.overlap("film", "film").iou == 1.0
    assert is_json(found.to_dict())


def test_sets_of_different_spaces_are_not_compared(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film")
    space = NeuronSpace.from_model(pupil.model, kinds=("attention",))
    pupil.record("heads", neurons=NeuronSet(space, {space.sites[0].name: [1, 2]}))
    for look_up in (anywhere.overlap, anywhere.diff, lambda *both: anywhere.overlaps(entries=both)):
        with pytest.raises(InputError, match=r"film@1 and heads@1 are of different neuron spaces"):
            look_up("film", "heads")
    assert [owner.entry for owner in anywhere.owners(space.sites[0].name, 2)] == ["heads@1"]
    assert list(anywhere.nearest("film")) == []


def test_the_matrix_of_a_stream_has_its_newest_versions_as_they_were_learnt(pupil: Pupil, anywhere: Registry) -> None:
    for name in ("news", "film", "news", "tweets"):
        pupil.record(name)
    pupil.record("else", stream="elsewhere")
    found = anywhere.overlaps("demo")
    assert found.entries == ("film@1", "news@2", "tweets@1")
    sets = [anywhere.neurons(anywhere.get(name)) for name in found.entries]
    assert found.sizes == tuple(map(len, sets))
    for row, one in enumerate(sets):
        for column, other in enumerate(sets):
            assert found.shared[row][column] == len(one & other)
            assert found.iou[row][column] == pytest.approx(one.iou(other))
    assert anywhere.overlaps(entries=["tweets", "film"]).entries == ("tweets@1", "film@1")
    with pytest.raises(InputError, match=r"no stream 'dmo'.*did you mean 'demo'"):
        anywhere.overlaps("dmo")
    for wrong in ({}, {"stream": "demo", "entries": ["film"]}):
        with pytest.raises(InputError, match="either a stream or entries"):
            anywhere.overlaps(**wrong)
    with pytest.raises(InputError, match="no entries"):
        anywhere.overlaps(entries=[])


def test_diff_of_two_versions(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film", **chosen(pupil, range(10)), metrics={"accuracy": 0.5, "scores": {"film": 0.5, "old": 1.0}})
    pupil.record(
        "film",
        **chosen(pupil, range(5, 10), [7]),
        method={"kinds": ["ffn"], "scorer": {"name": "taylor", "steps": 3}, "budget": 0.1},
        data_fingerprint="other",
        metrics={"accuracy": 0.5, "scores": {"film": 0.75}},
    )
    found = anywhere.diff("film@1", "film@2")
    lower, upper = (site.name for site in pupil.space.sites)
    assert (found.added, found.removed, found.kept) == ({upper: 1}, {lower: 5}, 5)
    seeds = anywhere.get("film@1").seed, anywhere.get("film@2").seed
    assert found.fields == {
        "data_fingerprint": ("data-film", "other"),
        "method.scorer": ("taylor", None),
        "method.scorer.name": (None, "taylor"),
        "method.scorer.steps": (None, 3),
        "metrics.scores.film": (0.5, 0.75),
        "metrics.scores.old": (1.0, None),
        "seed": seeds,
    }
    assert anywhere.diff("film@2", "film@2").fields == {}
    assert is_json(found.to_dict())


def test_capacity_is_what_the_chain_owns_and_leaves(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film", **chosen(pupil, range(10)))
    pupil.record("news", **chosen(pupil, range(8, 20), range(64)))
    pupil.record("later", **chosen(pupil, range(60)))
    lower, upper = anywhere.capacity("news")
    assert (lower.site, lower.layer, lower.kind, lower.size) == (pupil.space.sites[0].name, 0, "ffn", 64)
    assert (lower.owners, lower.free) == ({"film@1": 10, "news@1": 12}, 64 - 20)
    assert (upper.layer, upper.owners, upper.free) == (1, {"news@1": 64}, 0)
    assert is_json(lower.to_dict())


def test_what_was_forgotten_owns_nothing(pupil: Pupil, anywhere: Registry) -> None:
    film = pupil.record("film", **chosen(pupil, range(10)))
    pupil.record("news", **chosen(pupil, range(20, 30)))
    without = pupil.record("film", **chosen(pupil, range(10)), forgets=film)
    assert [entry.reference for entry in anywhere.learnt(without)] == ["news@1"]
    assert [entry.reference for entry in anywhere.learnt("news")] == ["film@1", "news@1"]
    lower, upper = anywhere.capacity(without)
    assert (lower.owners, lower.free) == ({"news@1": 10}, 54)
    assert (upper.owners, upper.free) == ({}, 64)


def test_nearest_sets(pupil: Pupil, anywhere: Registry) -> None:
    entry = pupil.record("wanted", **chosen(pupil, range(20)))
    for name, neurons in {"far": range(40, 64), "near": range(2, 22), "twin": range(20), "half": range(10)}.items():
        pupil.record(name, **chosen(pupil, neurons))
    expected = [("twin@1", 1.0), ("near@1", 18 / 22), ("half@1", 0.5), ("far@1", 0.0)]
    assert [(near.entry, pytest.approx(near.value)) for near in anywhere.nearest("wanted")] == expected
    assert [near.entry for near in anywhere.nearest(entry, k=2)] == ["twin@1", "near@1"]
    found = anywhere.nearest(anywhere.neurons(entry))
    assert found[:2] == [Near("twin@1", "twin", 1.0), Near("wanted@1", "wanted", 1.0)]  # of equals the newer
    with pytest.raises(InputError, match="k is 0"):
        anywhere.nearest(entry, k=0)
    foreign = NeuronSpace.from_model(pupil.model, kinds=("attention",))
    assert list(anywhere.nearest(foreign.all())) == []


def test_what_others_record_meanwhile_is_found(pupil: Pupil, anywhere: Registry, place: Any, base: Path) -> None:
    entry = pupil.record("film", **chosen(pupil, range(20)))
    site = pupil.space.sites[0].name
    assert [owner.entry for owner in anywhere.owners(site, 3)] == ["film@1"]
    elsewhere = place.open()
    try:
        writer = Pupil(elsewhere, base)
        writer.step = 100
        writer.record("news", **chosen(writer, range(10)))
    finally:
        elsewhere.close()
    assert [owner.entry for owner in anywhere.owners(site, 3)] == ["film@1", "news@1"]
    assert [near.entry for near in anywhere.nearest(entry)] == ["news@1"]


def without(held: Held, place: int) -> Held:
    """What is held, as if one entry had not been committed yet."""
    names = ("ids", "bases", "tasks", "references", "bitmaps")
    kept = {name: getattr(held, name)[:place] + getattr(held, name)[place + 1 :] for name in names}
    return replace(held, **kept, sizes=np.delete(held.sizes, place))


def test_the_index_takes_ids_that_are_committed_out_of_order(pupil: Pupil, anywhere: Registry) -> None:
    """An entry whose number was drawn first may be committed last; it must not be missed."""
    entries = [pupil.record(name, **chosen(pupil, range(9))) for name in ("film", "news", "tweets")]
    anywhere.nearest(entries[0])
    (space,) = anywhere._index._spaces
    anywhere._index._spaces[space] = without(anywhere._index._spaces[space], place=1)
    assert [owner.entry for owner in anywhere.owners(pupil.space.sites[0].name, 3)] == ["film@1", "news@1", "tweets@1"]
    assert {near.entry for near in anywhere.nearest(entries[0])} == {"news@1", "tweets@1"}


def test_several_threads_look_up_at_once(pupil: Pupil, anywhere: Registry) -> None:
    for name in ("film", "news", "tweets"):
        pupil.record(name, **chosen(pupil, range(9)))
    site, answers = pupil.space.sites[0].name, []
    threads = [
        threading.Thread(target=lambda: answers.append([each.entry for each in anywhere.owners(site, 3)]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [["film@1", "news@1", "tweets@1"]] * 8


def test_nearest_by_scores_and_what_to_start_from(pupil: Pupil, anywhere: Registry) -> None:
    entry = pupil.record("wanted", scores=drawn(pupil.space, 1))
    pupil.record("stranger", scores=drawn(pupil.space, 2))
    pupil.record("cousin", scores=drawn(pupil.space, 1, noise=2.0))
    pupil.record("twin", scores=drawn(pupil.space, 1, noise=0.1))
    pupil.record("mute")
    near = anywhere.nearest(drawn(pupil.space, 1))
    assert [each.entry for each in near] == ["wanted@1", "twin@1", "cousin@1", "stranger@1"]
    assert near[0].value == pytest.approx(1.0, abs=1e-3)
    assert [each.entry for each in anywhere.nearest(drawn(pupil.space, 1), k=1)] == ["wanted@1"]
    suggested = anywhere.suggest(entry)
    assert {each.entry.task for each in suggested} == {"twin", "cousin", "stranger", "mute"}
    assert suggested[0].entry.task == "twin"
    assert [each.entry.task for each in anywhere.suggest("wanted", k=1)] == ["twin"]
    assert len(anywhere.suggest(drawn(pupil.space, 1))) == 5
    assert [each.task for each in anywhere.nearest(entry, 2, by="scores")] == ["twin", "cousin"]
    forgetting = pupil.record("twin", forgets=anywhere.get("twin"), scores=drawn(pupil.space, 1))
    assert forgetting.reference not in [each.entry.reference for each in anywhere.suggest(entry)]
    with pytest.raises(InputError, match="mute@1 was recorded without scores"):
        anywhere.suggest("mute")
    with pytest.raises(InputError, match=r"budget 0\.9: fraction 0\.9 is outside"):
        anywhere.suggest("wanted", budget=0.9)


def test_the_strongest_neurons(pupil: Pupil, anywhere: Registry) -> None:
    scores = drawn(pupil.space, 1)
    entry = pupil.record("film", scores=scores)
    stored, owned = anywhere.scores(entry), anywhere.neurons(entry)
    assert stored is not None
    found = anywhere.strongest(entry, k=200)
    assert len(found) == len(pupil.space)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    for each in found:
        assert each.score == float(stored.values[each.site][each.neuron])
        assert each.owned == (each.neuron in owned[each.site])
    assert len(anywhere.strongest("film", k=3)) == 3
    pupil.record("mute")
    with pytest.raises(InputError, match="mute@1 was recorded without scores"):
        anywhere.strongest("mute")


def references(tree: Lineage) -> list[tuple[str, str | None]]:
    return [(tree.entry, tree.link), *(each for child in tree.children for each in references(child))]


def test_lineage_is_the_whole_tree(pupil: Pupil, anywhere: Registry) -> None:
    film = pupil.record("film")
    news = pupil.record("news")
    pupil.parent = film
    pupil.record("tweets", reused_from=news)
    pupil.parent = news
    pupil.record("film", forgets=film)
    pupil.parent = None
    pupil.record("else", reused_from=news, stream="other")
    pupil.record("more", stream="other")
    pupil.parent = None
    pupil.record("alone")
    tree = anywhere.lineage("more")
    assert references(tree) == [
        ("film@1", None),
        ("news@1", "parent"),
        ("tweets@1", "reused from"),
        ("film@2", "parent"),
        ("else@1", "reused from"),
        ("more@1", "parent"),
        ("tweets@1", "parent"),
        ("film@2", "forgets"),
    ]
    assert anywhere.lineage(film) == tree == anywhere.lineage("film@2")
    assert references(anywhere.lineage("alone")) == [("alone@1", None)]
    assert tree.to_dict()["children"][0]["entry"] == "news@1" and is_json(tree.to_dict())


def test_text_is_routed_to_the_entry_it_looks_like(anywhere: Registry, tmp_path: Path) -> None:
    pupil = Pupil(anywhere, save_tiny(tmp_path / "base"))
    model, tokenizer = load_base(str(pupil.folder))
    for name, words in (("colours", COLOURS), ("animals", ANIMALS)):
        pupil.record(name, signature=Signature.of(model, tokenizer, texts_of(words)))
    asked = ["cow the fox hen", "red a blue green"]
    assert list(anywhere.route(asked, "animals")) == ["animals@1", "colours@1"]
    assert list(anywhere.route(asked[0], anywhere.get("colours"), base=pupil.folder)) == [None]


def test_route_needs_signatures(pupil: Pupil, anywhere: Registry) -> None:
    pupil.record("film")
    with pytest.raises(InputError, match="film@1 was recorded without a signature"):
        anywhere.route("w1 w2", "film")


def test_a_damaged_set_is_named(pupil: Pupil, anywhere: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pupil.record("film")
    monkeypatch.setattr(index, "_rows", lambda session, ids: [(each, 1, "film", 1, b"junk") for each in ids])
    with pytest.raises(FailedError, match="the neurons of film@1 are damaged"):
        anywhere.nearest("film")
    assert isinstance(anywhere.get("film"), Entry)
