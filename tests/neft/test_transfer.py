"""What a task starts from: what each start may choose, and the probe that decides and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from neft.errors import InputError
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.protection import Candidates
from neft.scoring import Scores
from neft.selection import Budget, Lent, SelectionSpec, select
from neft.tasks import Example, Task
from neft.training import train
from neft.training_spec import TrainingSpec
from neft.transfer import Start, decide, hold_out, row_losses, start_from
from neft.tuner import NeftConfig
from tests.tiny import COLOURS, FILLERS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BUDGET, SPEC = Budget(neurons=0.25), SelectionSpec()
TRAINING = TrainingSpec(max_steps=4, learning_rate=0.02, max_length=16)


def task(labels: Sequence[str] = ("warm", "cold"), rows: int = 64) -> Task:
    draw = random.Random(0)
    examples = []
    for number in range(rows):
        word = draw.choice(COLOURS[:3] if number % 2 else COLOURS[3:])
        text = " ".join([*draw.choices(FILLERS, k=3), word])
        examples.append(Example(f"Text: {text} Kind:", f" {labels[number % 2]}"))
    return Task("task", tuple(examples), tuple(examples), "accuracy", tuple(f" {label}" for label in labels))


def drawn(space: NeuronSpace, seed: int = 0) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    return Scores(space, {site.name: torch.rand(site.size, generator=draw) for site in space.sites})


def fresh(found: Candidates) -> Start:
    return Start("fresh", select(found.scores, BUDGET, SPEC, found.free, found.when_full, found.lent))


def learnt(model: PreTrainedModel, neurons: NeuronSet, what: Task, steps: int) -> Overlay:
    """The rows that a task gives these neurons; the model is left as it was."""
    adapted = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    train(adapted, TOKENIZER, what, TRAINING.model_copy(update={"max_steps": steps}), 0)
    overlay = adapted.base_model.overlay(neurons)
    adapted.base_model.unload()
    return overlay


def first(space: NeuronSpace, count: int) -> NeuronSet:
    return NeuronSet(space, {site.name: range(count) for site in space.sites})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def space(model: PreTrainedModel) -> NeuronSpace:
    return NeuronSpace.from_model(model)


def test_a_warm_start_takes_what_is_free_of_the_entry_and_fills_up(model: PreTrainedModel, space: NeuronSpace) -> None:
    overlay = Overlay.read(model, first(space, 12))
    found = Candidates(space.all() - first(space, 4), drawn(space))
    start = start_from(overlay, "a@1", False, found, BUDGET, SPEC)
    assert start is not None
    assert start.kind == "warm"
    assert len(start.selection.neurons) == len(fresh(found).selection.neurons)
    assert not start.selection.neurons - found.free
    taken = first(space, 12) - first(space, 4)
    assert not taken - start.selection.neurons
    assert start.rows is not None
    assert start.rows.neurons == taken
    expected = Overlay.read(model, taken)
    assert all(torch.equal(rows, expected.values[name]) for name, rows in start.rows.values.items())


def test_sharing_goes_as_far_as_the_policy_leaves_free_or_lends(model: PreTrainedModel, space: NeuronSpace) -> None:
    owned = first(space, 12)
    overlay, scores = Overlay.read(model, owned), drawn(space)
    assert start_from(overlay, "a@1", True, Candidates(space.all() - owned, scores), BUDGET, SPEC) is None
    lent = Lent(first(space, 6), {site.name: torch.zeros(site.size) for site in space.sites})
    start = start_from(overlay, "a@1", True, Candidates(space.all() - owned, scores, "share", lent), BUDGET, SPEC)
    assert start is not None
    assert (start.kind, start.rows) == ("share", None)
    assert start.selection.neurons & owned == first(space, 6)


def test_the_probe_leaves_the_model_as_it_was_and_prefers_the_related_task(
    model: PreTrainedModel, space: NeuronSpace
) -> None:
    found = Candidates(space.all(), drawn(space))
    twin = learnt(model, first(space, 16), task(), steps=30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    warm = start_from(twin, "twin@1", False, found, BUDGET, SPEC)
    assert warm is not None
    decision = decide(model, TOKENIZER, task(), [fresh(found), warm], TRAINING, 2, 0, lambda neurons: None)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert decision.start is warm
    assert decision.to_dict()["held_out_losses"].keys() == {"fresh", "warm twin@1"}
    assert decision.advantage > decision.noise


def test_a_tie_goes_to_the_fresh_start(model: PreTrainedModel, space: NeuronSpace) -> None:
    start = fresh(Candidates(space.all(), drawn(space)))
    same = Start("warm", start.selection, Overlay.read(model, start.selection.neurons), "same@1")
    decision = decide(model, TOKENIZER, task(), [start, same], TRAINING, 2, 0, lambda neurons: None)
    assert decision.start is start
    assert decision.advantage == 0


def test_a_warm_start_reaches_a_loss_in_fewer_steps(model: PreTrainedModel, space: NeuronSpace) -> None:
    found = Candidates(space.all(), drawn(space))
    twin = learnt(model, first(space, 16), task(), steps=30)
    warm = start_from(twin, "twin@1", False, found, BUDGET, SPEC)
    assert warm is not None

    def steps(start: Start, enough: float) -> int:
        for count in (1, 2, 4, 8, 16):
            copy = tiny_model()
            if start.rows is not None:
                start.rows.lay_on(copy)
            learnt(copy, start.selection.neurons, task(), count).lay_on(copy)
            if float(row_losses(copy, TOKENIZER, task().train[:16], 16).mean()) < enough:
                return count
        return 32

    assert steps(warm, 0.5) < steps(fresh(found), 0.5)


def test_held_out_rows_are_training_rows_that_the_probe_does_not_see() -> None:
    rows = tuple(Example(f"{number}", " warm") for number in range(40))
    kept, held_out = hold_out(Task("task", rows, (), "accuracy"), seed=3)
    assert set(kept) | set(held_out) == set(rows)
    assert not set(kept) & set(held_out)
    assert len(held_out) == 10
    with pytest.raises(InputError, match="which has 7 in all"):
        hold_out(Task("task", rows[:7], (), "accuracy"), seed=3)
