"""States of a chain, stepped between bit for bit, and the router over a chain's signatures."""

from __future__ import annotations

import pytest
import torch

from neft.audit import state_digest
from neft.errors import InputError
from neft.models import load_base
from neft.routing import Signature

TASKS = ("films", "news", "films")


def signature(place: int) -> Signature:
    return Signature(torch.full((4,), 10.0 * place), torch.eye(4)[:1], torch.ones(1), 1.0, -8.0, 1, None)


@pytest.fixture
def entries(pupil):
    """Three tasks in a chain, with overlapping sets."""
    return [pupil.record(task, signature=signature(place)) for place, task in enumerate(TASKS)]


def test_every_state_is_reached_from_every_other_bit_for_bit(registry, entries, base, keep, is_same):
    model, _ = load_base(str(base))
    weights = {None: keep(model)}
    for entry in entries:
        weights[entry.reference] = keep(registry.checkout(entry)[0])
    states = registry.states(entries[-1], model)
    assert states.names == ("films@1", "news@1", "films@2")
    for start in weights:
        for end, expected in weights.items():
            states.visit(start)
            states.visit(end)
            assert states.here == end
            assert is_same(model, expected)
    for entry in entries:
        states.visit(entry.reference)
        assert state_digest(model) == entry.state_digest


def test_a_state_that_is_not_in_the_chain_is_refused(registry, entries, base):
    model, _ = load_base(str(base))
    states = registry.states(entries[1], model)
    with pytest.raises(InputError, match=r"no state 'films@2' in the chain; did you mean 'films@1'"):
        states.visit("films@2")
    assert states.here is None


def test_a_router_knows_the_entries_of_one_chain(registry, entries):
    points = torch.tensor([[0.0] * 4, [10.0] * 4, [20.0] * 4])
    assert registry.router("films").nearest(points) == ["films@1", "news@1", "films@2"]
    assert registry.router("news").nearest(points) == ["films@1", "news@1", None]
    assert registry.router("films", 1).nearest(points) == ["films@1", None, None]


def test_an_entry_without_a_signature_cannot_be_routed_to(registry, pupil, entries):
    pupil.record("tweets")
    with pytest.raises(InputError, match=r"tweets@1 was recorded without a signature.*learn the stream again"):
        registry.router("tweets")
