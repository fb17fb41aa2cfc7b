"""Courses: what a stream learns at once, from which state, for how long, and which of its scores are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from neft.audit import state_digest
from neft.baselines import Course
from neft.errors import FailedError
from neft.forgetting import AccuracyMatrix
from neft.tasks import Task
from neft.training_spec import TrainingSpec


class Sequential:
    """Each task goes on from the model that learnt the one before; all tasks are measured after each."""

    #: Whether the model, after any task, is one that has learnt all tasks so far.
    accumulates = True

    def open(self, model: nn.Module) -> None:
        """Look at the untouched model, before anything is learnt."""

    def lessons(self, tasks: Sequence[Task]) -> tuple[Task, ...]:
        """What is learnt, in order."""
        return tuple(tasks)

    def begin(self, model: nn.Module) -> None:
        """Bring `model` to the state that the next lesson starts from, in place."""

    def training(self, spec: TrainingSpec, tasks: Sequence[Task]) -> TrainingSpec:
        """How long a lesson takes."""
        return spec

    def measured(self, matrix: AccuracyMatrix, measure: Callable[[int], float]) -> AccuracyMatrix:
        """The R matrix after one more lesson; `measure` scores the model as it stands on a task, by its place."""
        return matrix.with_row([measure(place) for place in range(len(matrix.tasks))])


class Single(Sequential):
    """Each task goes on from the base model, and is measured on its own model alone."""

    accumulates = False

    def open(self, model: nn.Module) -> None:
        self._base = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        self._digest = state_digest(model)

    def begin(self, model: nn.Module) -> None:
        """
        Raises:
            FailedError: the model is not the base model again, bit for bit.
        """
        with torch.no_grad():
            model.load_state_dict(self._base)
        if (found := state_digest(model)) != self._digest:
            raise FailedError(
                f"the base model is not had back before a task: its state is {found[:12]}, not {self._digest[:12]}; "
                "report this as a bug"
            )

    def measured(self, matrix: AccuracyMatrix, measure: Callable[[int], float]) -> AccuracyMatrix:
        if not matrix.rows:
            return super().measured(matrix, measure)
        place = matrix.learnt
        later = [None] * (len(matrix.tasks) - place - 1)
        return matrix.with_row([*matrix.rows[-1][:place], measure(place), *later])


class Joint(Sequential):
    """All tasks are learnt at once, in as many steps as one after another; only the last row is measured."""

    def lessons(self, tasks: Sequence[Task]) -> tuple[Task, ...]:
        train = tuple(example for task in tasks for example in task.train)
        evaluation = tuple(example for task in tasks for example in task.eval)
        # Each task is measured by itself, so this metric stands for nothing but the data.
        return (Task("all tasks", train, evaluation, tasks[0].metric),)

    def training(self, spec: TrainingSpec, tasks: Sequence[Task]) -> TrainingSpec:
        if spec.max_steps is None:
            return spec
        return spec.model_copy(update={"max_steps": spec.max_steps * len(tasks)})

    def measured(self, matrix: AccuracyMatrix, measure: Callable[[int], float]) -> AccuracyMatrix:
        if matrix.rows:
            for _ in matrix.tasks[1:]:
                matrix = matrix.with_row([None] * len(matrix.tasks))
        return super().measured(matrix, measure)


COURSES: dict[Course, type[Sequential]] = {"sequential": Sequential, "single": Single, "joint": Joint}
