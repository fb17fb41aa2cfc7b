"""Rehearsal: what is kept of a task is balanced and seeded, and what is mixed in has the share that was asked for."""

from __future__ import annotations

from collections import Counter

import pytest

from neft.rehearsal import Rehearsal, kept
from neft.tasks import Example, Task

#: Six of ten examples are `a`, three `b`, one `c`.
ROWS = tuple(Example(f"text {place}", f" {label}") for place, label in enumerate("aaaaaabbbc"))
LABELLED = Task("labelled", ROWS, ROWS, "accuracy", (" a", " b", " c"))
WRITTEN = Task("written", ROWS, ROWS, "exact_match")


def test_a_classification_is_kept_in_balance() -> None:
    drawn = kept(LABELLED, 5, seed=0)
    assert Counter(example.completion for example in drawn) == {" a": 2, " b": 2, " c": 1}
    assert len(set(drawn)) == 5 and set(drawn) <= set(ROWS)
    # Where a completion has no more examples, the others fill up.
    assert Counter(example.completion for example in kept(LABELLED, 8, seed=0)) == {" a": 4, " b": 3, " c": 1}


def test_generation_is_kept_as_it_is_drawn() -> None:
    drawn = kept(WRITTEN, 6, seed=0)
    assert len(set(drawn)) == 6 and drawn != ROWS[:6]


@pytest.mark.parametrize("task", [LABELLED, WRITTEN])
def test_the_seed_alone_decides_and_a_small_task_is_kept_whole(task: Task) -> None:
    assert kept(task, 4, seed=1) == kept(task, 4, seed=1)
    assert len({kept(task, 4, seed) for seed in range(5)}) > 1
    assert sorted(kept(task, 99, seed=0), key=ROWS.index) == list(ROWS)


@pytest.mark.parametrize(("share", "mixed"), [(0.5, 12), (0.25, 4), (0.8, 48)])
def test_the_share_that_was_asked_for_is_rehearsed(share: float, mixed: int) -> None:
    rows = Rehearsal((ROWS[:3], ROWS[6:8]), share).rehearsed(12)
    assert len(rows) == mixed == round(share * (12 + mixed))
    counts = Counter(rows)
    assert sum(counts[example] for example in ROWS[:3]) == mixed // 2
    # Each of a task's examples is taken as often as the others, to one.
    assert max(counts[example] for example in ROWS[:3]) <= min(counts[example] for example in ROWS[:3]) + 1
    assert counts.keys() <= set(ROWS[:3] + ROWS[6:8])


def test_nothing_is_rehearsed_before_anything_was_learnt() -> None:
    assert Rehearsal(()).rehearsed(12) == ()
