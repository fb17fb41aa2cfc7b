"""Forgetting: a chain without one of its tasks, bit for bit where tasks are apart, and by a named policy elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from neft.audit import state_digest
from neft.errors import FailedError, InputError
from neft.models import load_base
from neft.neurons import NeuronSpace
from neft.overlay import Overlay
from tests.registry.test_states import signature

UP = "model.layers.0.mlp.up_proj"


def without(registry, base, *entries):
    """The weights of a model that has learnt these entries alone."""
    model, _ = load_base(str(base))
    for entry in entries:
        registry.overlay(entry).lay_on(model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rows(model, *neurons):
    """Up rows of neurons of the first layer, in float64."""
    return model.get_submodule(UP).weight[list(neurons)].double()


def test_tasks_apart_go_bit_for_bit(anywhere, new_pupil, base, is_same):
    """As a model on which the task was never learnt, whichever of them it is; and every state before stays."""
    pupil = new_pupil(anywhere, base)
    films, news, mail = (
        pupil.record(task, neurons=pupil.of(*range(start, start + 5)))
        for task, start in (("films", 0), ("news", 5), ("mail", 10))
    )
    kept = {"films": (news, mail), "news": (films, mail), "mail": (films, news)}
    for taken in (films, news, mail):
        entry = anywhere.forget(taken, head=mail)
        assert (entry.reference, entry.parent, entry.forgets) == (f"{taken.task}@2", "mail@1", taken.reference)
        assert anywhere.neurons(entry) == anywhere.neurons(taken)
        assert entry.method == {"forget": taken.reference, "overlaps": "refuse"}
        assert entry.audit["identical"] is True
        model, _ = anywhere.checkout(entry)
        assert is_same(model, without(anywhere, base, *kept[taken.task]))
        assert state_digest(model) == entry.state_digest
        assert anywhere.get(entry.reference) == entry
    assert is_same(anywhere.checkout(mail)[0], without(anywhere, base, films, news, mail))


def test_all_tasks_one_after_another_leave_the_base(registry, pupil, base, is_same):
    for start, task in enumerate(("films", "news", "mail")):
        pupil.record(task, neurons=pupil.of(start, start + 3))
    for task in ("news@1", "films@1", "mail@1"):
        entry = registry.forget(task)
    assert [link.reference for link in registry.chain(entry)][3:] == ["news@2", "films@2", "mail@2"]
    assert is_same(registry.checkout(entry)[0], without(registry, base))


def test_it_is_recorded_once(anywhere, new_pupil, base):
    pupil = new_pupil(anywhere, base)
    films = pupil.record("films", neurons=pupil.of(0))
    news = pupil.record("news", neurons=pupil.of(1))
    entry = anywhere.forget("films", head="news")
    assert anywhere.forget(films, head=news, overlaps="sum") == entry
    assert [each.reference for each in anywhere.list()] == ["films@1", "news@1", "films@2"]
    for again in (films, "films@1", "films"):
        with pytest.raises(InputError, match=r"films@1 is forgotten already|teaches nothing .* takes films@1 out"):
            anywhere.forget(again)
    with pytest.raises(InputError, match=r"films@2 teaches nothing that could be forgotten: it takes films@1 out"):
        anywhere.forget(entry)


def test_what_shares_neurons_is_listed(registry, pupil):
    pupil.record("films", neurons=pupil.of(0, 1, 2, 3))
    pupil.record("news", neurons=pupil.of(3, 4))
    pupil.record("mail", neurons=pupil.of(2, 3, 9))
    pupil.record("apart", neurons=pupil.of(20))
    says = r"films@1 cannot be forgotten: .* news@1 \(2 neurons\), mail@1 \(4 neurons\); .*`overlaps`"
    with pytest.raises(InputError, match=says):
        registry.forget("films")
    assert len(registry.list()) == 4
    # What has been forgotten itself stands in nobody's way.
    registry.forget("mail")
    with pytest.raises(InputError, match=r"neurons of it, news@1 \(2 neurons\);"):
        registry.forget("films")
    registry.forget("news")
    assert registry.forget("films").forgets == "films@1"


def test_last_leaves_what_later_tasks_have(registry, pupil, base, is_same):
    films = pupil.record("films", neurons=pupil.of(0, 1, 2))
    news = pupil.record("news", neurons=pupil.of(2, 3))
    entry = registry.forget(films, overlaps="last")
    assert entry.method == {"forget": "films@1", "overlaps": "last"}
    assert is_same(registry.checkout(entry)[0], without(registry, base, news))
    # And the later one forgotten too, nothing is left: what was under it is not there any more.
    assert is_same(registry.checkout(registry.forget(news))[0], without(registry, base))


def test_sum_takes_back_the_task_alone(registry, pupil, base, is_same):
    """Rows of both become the base's, plus what the later task changed in them; all others go back bit for bit."""
    plain, _ = load_base(str(base))
    films = pupil.record("films", neurons=pupil.of(0, 1, 2))
    after_films, _ = registry.checkout(films)
    news = pupil.record("news", neurons=pupil.of(2, 3))
    after_news, _ = registry.checkout(news)
    entry = registry.forget(films, overlaps="sum")
    model, _ = registry.checkout(entry)
    changed = rows(plain, 2) + (rows(after_news, 2) - rows(after_films, 2))
    assert torch.equal(rows(model, 2), changed.float().double())
    assert not torch.equal(rows(model, 2), rows(after_news, 2))
    assert torch.equal(rows(model, 0, 1), rows(plain, 0, 1))
    assert torch.equal(rows(model, 3), rows(after_news, 3))
    assert is_same(registry.checkout(registry.forget(news))[0], without(registry, base))


def test_a_task_between_two_that_share_its_neurons(registry, pupil, base):
    """The earlier one's rows come back, bit for bit, and the later one's changes are kept as the policy says."""
    films = pupil.record("films", neurons=pupil.of(0, 1))
    pupil.record("news", neurons=pupil.of(0, 1))
    before, _ = registry.checkout("news")
    mail = pupil.record("mail", neurons=pupil.of(1))
    after, _ = registry.checkout(mail)
    learnt = rows(registry.checkout(films)[0], 0, 1)
    summed, _ = registry.checkout(registry.forget("news", overlaps="sum"))
    assert torch.equal(rows(summed, 0), learnt[:1])
    assert torch.equal(rows(summed, 1), (learnt[1:] + (rows(after, 1) - rows(before, 1))).float().double())
    last, _ = registry.checkout(registry.forget("news@1", head=mail, overlaps="last"))
    assert torch.equal(rows(last, 0), learnt[:1])
    assert torch.equal(rows(last, 1), rows(after, 1))


def test_what_was_forgotten_by_sum_stays_so_when_the_next_goes(registry, pupil, base):
    plain, _ = load_base(str(base))
    changes = []
    before = plain
    for task in ("films", "news", "mail"):
        pupil.record(task, neurons=pupil.of(0, 1))
        after, _ = registry.checkout(task)
        changes.append(rows(after, 0, 1) - rows(before, 0, 1))
        before = after
    registry.forget("films", overlaps="sum")
    model, _ = registry.checkout(registry.forget("news", overlaps="sum"))
    torch.testing.assert_close(rows(model, 0, 1), rows(plain, 0, 1) + changes[2], atol=1e-6, rtol=0)


def test_a_task_that_is_learnt_again_can_be_forgotten_again(registry, pupil, base, is_same):
    pupil.record("films", neurons=pupil.of(0, 1))
    news = pupil.record("news", neurons=pupil.of(5))
    pupil.parent = registry.forget("films")
    registry.overlay(pupil.parent).lay_on(pupil.model)
    again = pupil.record("films", neurons=pupil.of(1, 2))
    assert again.reference == "films@3"
    entry = registry.forget("films")
    assert (entry.reference, entry.forgets) == ("films@4", "films@3")
    assert is_same(registry.checkout(entry)[0], without(registry, base, news))


def test_several_chains_ask_for_one(anywhere, new_pupil, base):
    pupil = new_pupil(anywhere, base)
    films = pupil.record("films", neurons=pupil.of(0))
    news = pupil.record("news", neurons=pupil.of(1))
    pupil.parent = films
    registry_mail = anywhere.record(replace(pupil.learn("mail", neurons=pupil.of(2)), state_digest=news.state_digest))
    with pytest.raises(InputError, match=r"2 chains go on from films@1, .*`head`: news@1, mail@1"):
        anywhere.forget("films")
    assert anywhere.forget("films", head="news").parent == "news@1"
    assert anywhere.ends(films) == [registry_mail, anywhere.get("films@2")]
    with pytest.raises(InputError, match=r"news@1 is not in the chain of mail@1"):
        anywhere.forget(news, head="mail")
    with pytest.raises(InputError, match=r"unknown overlaps 'lst'; did you mean 'last'"):
        anywhere.forget("films", head="news", overlaps="lst")


def test_a_name_alone_means_the_version_of_the_chain(registry, base, new_pupil):
    pupil = new_pupil(registry, base)
    pupil.record("films", neurons=pupil.of(0))
    head = pupil.record("news", neurons=pupil.of(1))
    new_pupil(registry, base, step=10).record("films")
    assert registry.get("films").version == 2
    assert registry.forget("films", head=head).forgets == "films@1"


def test_another_base_model_and_a_damaged_chain_record_nothing(registry, pupil, base, other_base):
    pupil.record("films", neurons=pupil.of(0))
    news = pupil.record("news", neurons=pupil.of(1))
    with pytest.raises(InputError, match="news@1 was learnt on base model"):
        registry.forget("films", base=other_base)
    with pytest.raises(InputError, match=r"base model of news@1 cannot be loaded; give the folder it is in now"):
        registry.forget("films", base=base / "nowhere")
    pupil.record("wrong", neurons=pupil.of(2), state_digest="0" * 64)
    with pytest.raises(FailedError, match=r"wrong@1 cannot be rebuilt"):
        registry.forget("films")
    registry.artifacts.path(news.overlay_file.sha256).unlink()
    with pytest.raises(FailedError, match=r"the overlay of news@1, .* is missing"):
        registry.forget("films")
    assert len(registry.list()) == 3


def test_other_neuron_spaces_are_refused(registry, pupil):
    pupil.record("films", neurons=pupil.of(0))
    pupil.space = NeuronSpace.from_model(pupil.model, ["attention"])
    pupil.record("news")
    with pytest.raises(InputError, match=r"films@1 cannot be forgotten: news@1 .* another neuron space"):
        registry.forget("films")


def test_a_sum_that_the_weights_cannot_hold_is_refused(registry, base, new_pupil):
    """float16 ends at 65504: from -60000 to 60000 is a change that it cannot add to anything."""
    pupil = new_pupil(registry, base, dtype="float16")
    for task, value in (("films", -60000.0), ("news", 60000.0)):
        neurons = pupil.of(0)
        rows = {name: torch.full_like(each, value) for name, each in Overlay.read(pupil.model, neurons).values.items()}
        overlay = Overlay(neurons, rows)
        overlay.lay_on(pupil.model)
        new = pupil.learn(task, neurons=neurons)
        overlay.lay_on(pupil.model)
        pupil.parent = registry.record(replace(new, overlay=overlay, state_digest=state_digest(pupil.model)))
    with pytest.raises(FailedError, match=r"films@1 cannot be forgotten by sum: .*torch.float16 cannot hold"):
        registry.forget("films", overlaps="sum")
    assert registry.forget("films", overlaps="last").method["overlaps"] == "last"


def test_a_router_finds_no_forgotten_task(registry, base, new_pupil):
    pupil = new_pupil(registry, base)
    for place, task in enumerate(("films", "news")):
        pupil.record(task, neurons=pupil.of(place), signature=signature(place))
    points = torch.tensor([[0.0] * 4, [10.0] * 4])
    assert registry.router("news").nearest(points) == ["films@1", "news@1"]
    assert registry.router(registry.forget("films")).nearest(points) == [None, "news@1"]


def test_those_who_forget_at_once_record_it_once(place, base, new_pupil):
    """Each with a registry of its own, at the same time."""
    with closing(place.open()) as registry:
        pupil = new_pupil(registry, base)
        pupil.record("films", neurons=pupil.of(0))
        pupil.record("news", neurons=pupil.of(1))

    def forget(_):
        with closing(place.open()) as opened:
            return opened.forget("films", head="news")

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(forget, range(3)))
    assert found[0] == found[1] == found[2]
    with closing(place.open()) as registry:
        assert [each.reference for each in registry.list()] == ["films@1", "news@1", "films@2"]
