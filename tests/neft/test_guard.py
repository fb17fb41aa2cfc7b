"""A guard beside training: its limits hold for every step, what it rehearses is trained on, its penalty counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from neft.errors import FailedError, InputError
from neft.guard import Guard, Limit
from neft.tasks import Example
from neft.training import train
from neft.tuner.model import trained_rows
from tests.neft.test_training import ROWS, TASK, TOKENIZER, adapted, encoded_rows, rows_of, spec, watched
from tests.tiny import tiny_model

Rows = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Limited(Guard):
    """The same limit for every module."""

    limit: Limit
    modules: Sequence[str]

    def limits(self) -> Mapping[str, Limit]:
        return dict.fromkeys(self.modules, self.limit)


@dataclass(frozen=True)
class Rehearsed(Guard):
    examples: Sequence[Example]
    asked: list[int] = field(default_factory=list)

    def rehearsed(self, count: int) -> Sequence[Example]:
        self.asked.append(count)
        return self.examples


@dataclass(frozen=True)
class Drawn(Guard):
    """Pulls every trained row towards zero."""

    weight: float

    def penalty(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return self.weight * torch.stack([rows.pow(2).sum() for rows in trained_rows(model).values()]).sum()


def rows_after(guard: Guard | None, **changes: Any) -> Rows:
    """The trained rows of a tiny model after training beside `guard`."""
    model, _ = adapted(tiny_model())
    train(model, TOKENIZER, TASK, spec(**changes), 0, guard=guard)
    return {name: rows.detach().clone() for name, rows in trained_rows(model).items()}


def rows_before() -> Rows:
    return {name: rows.detach().clone() for name, rows in trained_rows(adapted(tiny_model())[0]).items()}


def hooks(model: nn.Module) -> int:
    return sum(len(parameter._backward_hooks or ()) for parameter in model.parameters())


def nothing(change: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(change)


NAMES = list(rows_before())
EARLY = {"early_stopping_patience": 2, "eval_steps": 2, "validation_fraction": 0.25, "max_steps": 8}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.5},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"bf16": True},
        EARLY,
    ],
    ids=str,
)
def test_a_limit_of_nothing_keeps_rows_bit_for_bit_and_leaves_the_others_free(changes: dict[str, Any]) -> None:
    before, after = rows_before(), rows_after(Limited(nothing, NAMES[:2]), **changes)
    for name in NAMES:
        assert torch.equal(after[name], before[name]) == (name in NAMES[:2]), name


def test_momentum_does_not_carry_rows_past_their_limit() -> None:
    """Adam's step has another direction than the gradient: one that is limited in some directions leaves them."""

    def first_half(change: torch.Tensor) -> torch.Tensor:
        return torch.cat([change[:, : change.shape[1] // 2], torch.zeros_like(change[:, change.shape[1] // 2 :])], 1)

    before, after = rows_before(), rows_after(Limited(first_half, NAMES), weight_decay=0.5, max_steps=6)
    for name in NAMES:
        half = before[name].shape[1] // 2
        assert torch.equal(after[name][:, half:], before[name][:, half:])
        assert not torch.equal(after[name][:, :half], before[name][:, :half])


def test_a_limit_scales_the_step_and_not_the_gradient_alone() -> None:
    """Half of everything, with AdamW whose first step has the size of the learning rate whatever the gradient's."""
    settings = {"max_steps": 1, "learning_rate": 0.01, "max_grad_norm": 0.0}
    before, free = rows_before(), rows_after(None, **settings)
    half = rows_after(Limited(lambda change: change / 2, NAMES), **settings)
    for name in NAMES:
        moved = (free[name] - before[name]).abs() > 0.009
        assert moved.any()
        torch.testing.assert_close(
            (half[name] - before[name])[moved], (free[name] - before[name])[moved] / 2, rtol=0.02, atol=1e-5
        )


def test_limits_apply_once_whatever_the_batches_of_a_step() -> None:
    """With plain descent a limit of a half counts twice, in gradient and step: a quarter, as one batch has it."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    before, free = rows_before(), rows_after(None, **settings, per_device_train_batch_size=12)
    for size, accumulation in ((12, 1), (4, 3), (2, 6)):
        limited = rows_after(
            Limited(lambda change: change / 2, NAMES),
            **settings,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        for name in NAMES:
            torch.testing.assert_close(
                limited[name] - before[name], (free[name] - before[name]) / 4, rtol=1e-3, atol=1e-6
            )


def test_no_hook_is_left_behind() -> None:
    model, _ = adapted(tiny_model())
    seen: list[int] = []

    def look(step: int, values: Mapping[str, float]) -> None:
        seen.append(hooks(model))

    train(model, TOKENIZER, TASK, spec(logging_steps=1), 0, look, Limited(nothing, NAMES))
    assert max(seen) == len(NAMES)
    assert hooks(model) == 0


@pytest.mark.parametrize("failure", ["interrupted", "diverged"])
def test_no_hook_is_left_behind_by_a_training_that_failed(failure: str) -> None:
    model, _ = adapted(tiny_model())

    def interrupt(step: int, values: Mapping[str, float]) -> None:
        if failure == "interrupted":
            raise KeyboardInterrupt

    rate = 1e30 if failure == "diverged" else 0.01
    with pytest.raises(FailedError if failure == "diverged" else KeyboardInterrupt):
        train(
            model,
            TOKENIZER,
            TASK,
            spec(logging_steps=1, learning_rate=rate),
            0,
            interrupt,
            Limited(lambda change: change / 2, NAMES),
        )
    assert hooks(model) == 0


def test_a_limit_of_rows_that_are_not_trained_is_refused() -> None:
    model, _ = adapted(tiny_model())
    with pytest.raises(InputError, match=r"guard limits module 'model\.layers\.9\.mlp\.up_proj', of which no rows"):
        train(model, TOKENIZER, TASK, spec(), 0, guard=Limited(nothing, ["model.layers.9.mlp.up_proj"]))
    with pytest.raises(InputError, match="of which no rows are trained"):
        train(tiny_model(), TOKENIZER, TASK, spec(), 0, guard=Limited(nothing, NAMES))


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, EARLY], ids=str)
def test_rehearsed_examples_are_trained_on_among_the_new_ones(changes: dict[str, Any]) -> None:
    old = (Example("Text: old cow Kind:", " tame"), Example("Text: new fox Kind:", " wild"))
    guard = Rehearsed(old)
    with watched() as seen:
        train(adapted(tiny_model())[0], TOKENIZER, TASK, spec(**{"max_steps": 8, **changes}), 0, guard=guard)
    held_out = rows_of(seen, training=False)
    assert rows_of(seen) == (encoded_rows() - held_out) | encoded_rows(old)
    assert not held_out & encoded_rows(old)
    assert guard.asked == [len(ROWS) - len(held_out)]
    assert bool(held_out) == bool(changes == EARLY)


def test_what_is_rehearsed_changes_what_is_learnt_and_an_epoch_is_longer_by_it() -> None:
    old = tuple(replace(row, completion=" south") for row in ROWS)
    free, rehearsed = rows_after(None), rows_after(Rehearsed(old))
    assert not torch.equal(free[NAMES[0]], rehearsed[NAMES[0]])
    steps = [
        train(adapted(tiny_model())[0], TOKENIZER, TASK, spec(max_steps=None, num_train_epochs=1), 0, guard=guard).steps
        for guard in (None, Rehearsed(old))
    ]
    assert steps == [3, 6]


@pytest.mark.parametrize(("size", "accumulation"), [(12, 1), (4, 3), (3, 4)])
def test_a_penalty_counts_once_a_step_whatever_its_batches(size: int, accumulation: int) -> None:
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    before, free, drawn = rows_before(), rows_after(None, **settings), rows_after(Drawn(0.5), **settings)
    for name in NAMES:
        # The gradient of 0.5 |rows|^2 is the rows.
        torch.testing.assert_close(drawn[name], free[name] - 0.1 * before[name], rtol=1e-4, atol=1e-6)


def test_a_penalty_is_not_part_of_what_early_stopping_looks_at() -> None:
    looks: list[float] = []

    def look(step: int, values: Mapping[str, float]) -> None:
        looks.extend([values["eval_loss"]] if "eval_loss" in values else [])

    model, _ = adapted(tiny_model())
    train(model, TOKENIZER, TASK, spec(**EARLY | {"learning_rate": 1e-9}), 0, look, Drawn(1e3))
    assert looks
    assert max(looks) < 20


def test_a_guard_that_does_nothing_changes_nothing() -> None:
    class Idle(Guard):
        pass

    free, idle = rows_after(None), rows_after(Idle())
    for name in NAMES:
        assert torch.equal(free[name], idle[name])
