"""The modes' matrices, from values of states made by hand."""

from __future__ import annotations

import pytest
import torch

from flows.modes import Modes, formula_of
from neft.forgetting import FORMULAS, AccuracyMatrix
from neft.routing import Signature

TASKS = ("films", "news")
#: For each state (untouched, after films, after news) and each task, the values of its two examples.
STATES = (((0.0, 0.0), (0.0, 1.0)), ((1.0, 1.0), (1.0, 0.0)), ((0.0, 0.5), (0.0, 1.0)))


def signature(place: float) -> Signature:
    return Signature(torch.tensor([place, 0.0]), torch.tensor([[1.0, 0.0]]), torch.ones(1), 1.0, -2.0, 1, None)


def made(films: list[tuple[float, float]], news: list[tuple[float, float]]) -> Modes:
    modes = Modes(("consolidated", "oracle", "routed"), AccuracyMatrix(TASKS, (), (2, 2)))
    modes._signatures = [signature(0.0), signature(10.0)]
    modes._requests = [torch.tensor(films), torch.tensor(news)]
    for state in STATES:
        modes.add(state)
    return modes


def test_the_oracle_takes_each_task_from_the_state_right_after_it() -> None:
    modes = made([(0.0, 0.0)] * 2, [(10.0, 0.0)] * 2)
    expected = ((0.0, 0.5), (1.0, None), (1.0, 0.5))
    assert modes.matrices["oracle"].rows == expected
    # Every prompt is sent to its task, so the routed scores are the oracle's.
    assert modes.matrices["routed"].rows == expected
    metrics = modes.metrics()
    assert metrics["oracle/backward_transfer"] == metrics["routed/backward_transfer"] == 0
    assert (metrics["routed/accuracy"], metrics["routed/none_near"]) == (1, 0)


def test_an_example_takes_the_value_of_the_state_that_it_is_sent_to() -> None:
    # The first film looks like news, the second like nothing; the news' second example looks like a film.
    modes = made([(10.0, 0.0), (50.0, 0.0)], [(10.0, 0.0), (0.0, 0.0)])
    routed = modes.matrices["routed"].rows
    # After films alone neither film is near it: the newest state answers, which is that after films.
    assert routed[1] == (1.0, None)
    # After news, the films are scored there (0 and 0.5), and the news' second example after films (0).
    assert routed[2] == (0.25, 0.0)
    metrics = modes.metrics()
    assert metrics["routed/accuracy"] == 0.25
    assert metrics["routed/none_near"] == 0.25
    assert metrics["routed/signature_bytes"] == 2 * 4 * 5


def test_one_mode_alone_needs_no_matrix_beside_the_streams() -> None:
    modes = Modes(("consolidated",), AccuracyMatrix(TASKS, (), (2, 2)))
    modes.add(STATES[0])
    assert modes.matrices == {} and modes.metrics() == {}


def test_every_metric_of_a_mode_has_a_formula() -> None:
    assert formula_of("oracle/forgetting") == formula_of("forgetting") == FORMULAS["forgetting"]
    for name in made([(0.0, 0.0)] * 2, [(10.0, 0.0)] * 2).metrics():
        assert formula_of(name)
    with pytest.raises(KeyError):
        formula_of("routed/nonsense")
