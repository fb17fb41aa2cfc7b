"""The R matrix and its metrics, against numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from neft.errors import InputError
from neft.forgetting import FORMULAS, AccuracyMatrix, general_delta

#: R[t,i] for three tasks; row 0 is the untouched model.
MATRIX = AccuracyMatrix(
    ("a", "b", "c"),
    (
        (0.10, 0.20, 0.30),
        (0.80, 0.25, 0.20),
        (0.90, 0.70, 0.45),
        (0.60, 0.50, 1.00),
    ),
    (100, 50, 10),
)

#: Each metric with its arithmetic. T = 3.
BY_HAND = {
    "average_accuracy": (0.60 + 0.50 + 1.00) / 3,
    "average_accuracy_micro": (100 * 0.60 + 50 * 0.50 + 10 * 1.00) / (100 + 50 + 10),
    "learning_accuracy": (0.80 + 0.70 + 1.00) / 3,
    "backward_transfer": ((0.60 - 0.80) + (0.50 - 0.70)) / 2,
    # The best before the last task and since it was learnt: a was at 0.90 after b.
    "forgetting": ((0.90 - 0.60) + (0.70 - 0.50)) / 2,
    # Just before it is learnt, against the untouched model; the first task has no before.
    "forward_transfer": ((0.25 - 0.20) + (0.45 - 0.30)) / 2,
}


def test_every_metric_equals_its_arithmetic() -> None:
    assert MATRIX.metrics() == pytest.approx(BY_HAND, abs=1e-12)
    assert MATRIX.learnt == 3


def test_metrics_along_the_stream_look_at_the_tasks_learnt_so_far() -> None:
    assert MATRIX.metrics(2) == pytest.approx(
        {
            "average_accuracy": (0.90 + 0.70) / 2,
            "average_accuracy_micro": (100 * 0.90 + 50 * 0.70) / 150,
            "learning_accuracy": (0.80 + 0.70) / 2,
            "backward_transfer": 0.90 - 0.80,
            "forgetting": 0.80 - 0.90,
            "forward_transfer": 0.25 - 0.20,
        },
        abs=1e-12,
    )
    shorter = AccuracyMatrix(MATRIX.tasks, MATRIX.rows[:3], MATRIX.examples)
    assert shorter.metrics() == MATRIX.metrics(2)


def test_one_task_has_no_transfer_and_no_forgetting() -> None:
    expected = {"average_accuracy": 0.80, "average_accuracy_micro": 0.80, "learning_accuracy": 0.80}
    assert MATRIX.metrics(1) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [(), ((0.1, 0.2, 0.3),)])
def test_nothing_learnt_gives_no_metric(rows: Any) -> None:
    matrix = AccuracyMatrix(("a", "b", "c"), rows, (1, 1, 1))
    assert matrix.learnt == 0
    assert matrix.metrics() == {}


def without(*places: tuple[int, int]) -> AccuracyMatrix:
    rows = [list(row) for row in MATRIX.rows]
    for step, task in places:
        rows[step][task] = None
    return AccuracyMatrix(MATRIX.tasks, tuple(map(tuple, rows)), MATRIX.examples)


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [
        ((0, 0), set()),
        ((1, 1), {"forward_transfer"}),
        ((0, 2), {"forward_transfer"}),
        ((2, 0), {"forgetting"}),
        ((2, 2), {"forward_transfer"}),
        ((3, 2), {"average_accuracy", "average_accuracy_micro", "learning_accuracy"}),
        ((1, 0), {"learning_accuracy", "backward_transfer", "forgetting"}),
        ((3, 0), {"average_accuracy", "average_accuracy_micro", "backward_transfer", "forgetting"}),
    ],
)
def test_a_metric_that_needs_a_missing_score_is_left_out_and_the_others_stand(
    missing: tuple[int, int], left_out: set[str]
) -> None:
    expected = {name: value for name, value in BY_HAND.items() if name not in left_out}
    assert without(missing).metrics() == pytest.approx(expected, abs=1e-12)


def test_intransigence_is_what_joint_training_reaches_beyond() -> None:
    joint = (0.85, 0.90, 0.95)
    assert MATRIX.intransigence(joint) == pytest.approx(((0.85 - 0.80) + (0.90 - 0.70) + (0.95 - 1.00)) / 3)


@pytest.mark.parametrize("joint", [(), (0.1, 0.2), (0.1, 0.2, 0.3, 0.4)])
def test_intransigence_needs_a_joint_score_for_each_task(joint: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=f"each of 3 learnt tasks, not {len(joint)}"):
        MATRIX.intransigence(joint)


def test_general_delta_is_the_mean_rise_of_log_likelihood_and_accuracy() -> None:
    before = {"perplexity/x": 10.0, "perplexity/y": 20.0, "harness/z": 0.5}
    after = {"harness/z": 0.4, "perplexity/y": 10.0, "perplexity/x": 20.0}
    assert general_delta(before, after) == pytest.approx(-0.1 / 3)
    worse = general_delta({"perplexity/x": 10.0}, {"perplexity/x": 10.2})
    assert worse == pytest.approx(-0.0198, abs=1e-4), "2 % more perplexity"


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({"x": 1.0}, {"y": 1.0}), ({"x": 1.0}, {})])
def test_general_delta_needs_the_same_probes(before: dict[str, float], after: dict[str, float]) -> None:
    with pytest.raises(InputError, match="general probes differ"):
        general_delta(before, after)


def test_every_metric_has_its_formula() -> None:
    assert set(FORMULAS) == {*BY_HAND, "intransigence", "general_delta"}
    assert all(FORMULAS.values())


def test_rows_are_added_one_by_one() -> None:
    grown = AccuracyMatrix(MATRIX.tasks, (), MATRIX.examples)
    for row in MATRIX.rows:
        grown = grown.with_row(row)
    assert grown == MATRIX
    with pytest.raises(InputError, match="at most 4 rows"):
        grown.with_row((0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("rows", "examples", "words"),
    [
        (((0.1, 0.2),), (1, 1, 1), "has 2 scores for 3 tasks"),
        ((), (1, 1), "2 counts"),
        (((0.1, 0.2, 0.3),) * 5, (1, 1, 1), "not 5 rows"),
    ],
)
def test_bad_shapes_are_refused(rows: Any, examples: tuple[int, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        AccuracyMatrix(("a", "b", "c"), rows, examples)


@pytest.mark.parametrize("learnt", [-1, 4])
def test_metrics_of_a_row_that_is_not_there_are_refused(learnt: int) -> None:
    with pytest.raises(InputError, match=f"holds 3 learnt tasks, not {learnt}"):
        MATRIX.metrics(learnt)


def test_a_matrix_survives_json_with_its_gaps() -> None:
    matrix = without((1, 2))
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))) == matrix
