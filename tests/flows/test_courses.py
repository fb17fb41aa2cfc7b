"""Courses: what is learnt in which order, from which state, for how long, and which scores are measured."""

from __future__ import annotations

import warnings

import pytest
import torch

from flows.courses import COURSES
from flows.figures import heatmap
from neft.audit import state_digest
from neft.errors import FailedError
from neft.forgetting import AccuracyMatrix
from neft.tasks import Example, Task
from neft.training_spec import TrainingSpec
from tests.tiny import tiny_model

ROWS = tuple(Example(f"text {place}", " yes") for place in range(6))
TASKS = (
    Task("one", ROWS[:2], ROWS[4:], "exact_match"),
    Task("two", ROWS[2:3], ROWS[4:], "rouge_l"),
    Task("three", ROWS[3:4], ROWS[5:], "exact_match"),
)
UNTOUCHED = (0.1, 0.2, 0.3)


def matrix_of(name: str) -> AccuracyMatrix:
    """The R matrix after a whole course, where learning k lessons scores k + 0.1 * place."""
    course, matrix = COURSES[name](), AccuracyMatrix(("one", "two", "three"), (), (1, 1, 2))
    matrix = course.measured(matrix, lambda place: UNTOUCHED[place])
    for learnt, _ in enumerate(course.lessons(TASKS), 1):
        matrix = course.measured(matrix, lambda place, learnt=learnt: learnt + 0.1 * place)
    return matrix


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("sequential", ((1.0, 1.1, 1.2), (2.0, 2.1, 2.2), (3.0, 3.1, 3.2))),
        ("single", ((1.0, None, None), (1.0, 2.1, None), (1.0, 2.1, 3.2))),
        ("joint", ((None,) * 3, (None,) * 3, (1.0, 1.1, 1.2))),
    ],
)
def test_the_scores_that_a_course_measures(name: str, rows: tuple[tuple[float | None, ...], ...]) -> None:
    assert matrix_of(name).rows == (UNTOUCHED, *rows)


def test_metrics_that_need_unmeasured_scores_are_left_out_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single, joint = matrix_of("single").metrics(), matrix_of("joint").metrics()
        heatmap(matrix_of("joint"), "joint").canvas.draw()
    assert single.keys() == {
        "average_accuracy",
        "average_accuracy_micro",
        "learning_accuracy",
        "backward_transfer",
        "forgetting",
    }
    assert single["backward_transfer"] == single["forgetting"] == 0
    assert joint == pytest.approx({"average_accuracy": 1.1, "average_accuracy_micro": 1.125})


def test_joint_learns_the_data_of_all_tasks_in_as_many_steps() -> None:
    course = COURSES["joint"]()
    (lesson,) = course.lessons(TASKS)
    assert lesson.train == ROWS[:4]
    assert course.training(TrainingSpec(max_steps=7), TASKS).max_steps == 21
    assert course.training(TrainingSpec(num_train_epochs=2), TASKS) == TrainingSpec(num_train_epochs=2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_single_starts_each_task_from_the_base_bit_for_bit(family: str) -> None:
    course, model = COURSES["single"](), tiny_model(family)
    digest = state_digest(model)
    course.open(model)
    for _ in range(2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(1.0)
        assert state_digest(model) != digest
        course.begin(model)
        assert state_digest(model) == digest


def test_single_notices_that_the_base_is_not_had_back() -> None:
    course, model = COURSES["single"](), tiny_model()
    course.open(model)
    model.register_buffer("more", torch.ones(1))
    model.load_state_dict = lambda state: None
    with pytest.raises(FailedError, match="the base model is not had back"):
        course.begin(model)
