"""The `functional` policy: what it keeps of a task, and that a new task's change stays across it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from neft.audit import state_digest
from neft.encoding import batches
from neft.errors import InputError
from neft.memory import Memory
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection import Learnt
from neft.protection.functional import Functional, written_by
from neft.scoring import SCORERS, Scores
from neft.selection import Budget, select
from neft.subspaces import gather, leading
from neft.tasks import Example, Task
from neft.training import train
from neft.training_spec import TrainingSpec
from neft.tuner import NeftConfig
from tests.tiny import ANIMALS, COLOURS, FILLERS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SPEC = TrainingSpec(max_steps=12, learning_rate=0.02, max_length=16, per_device_train_batch_size=4)


def task(name: str, words: tuple[str, ...], ask: str) -> Task:
    rows = tuple(
        Example(f"Text: {FILLERS[place % len(FILLERS)]} {word} {ask}", (" warm", " cold")[place % 2])
        for place, word in enumerate(words * 4)
    )
    return Task(name, rows, rows, "accuracy", (" warm", " cold"))


FIRST, SECOND = task("colours", COLOURS, "Kind:"), task("animals", ANIMALS, "the")


def chosen(model: nn.Module, policy: Functional, of: Task, earlier: list[Learnt]) -> tuple[NeuronSet, Scores]:
    space = NeuronSpace.from_model(model)
    scores = SCORERS["taylor"]().score(model, TOKENIZER, space, list(batches(TOKENIZER, of.train, 8)), 0)
    found = policy.candidates(scores, earlier, space.none())
    return select(found.scores, Budget(neurons=0.25), None, found.free, found.when_full, found.lent).neurons, scores


def learn(model: PreTrainedModel, policy: Functional, of: Task, earlier: list[Learnt], steps: int = 12) -> Learnt:
    """Learn a task in `model`, in place, as a stream does."""
    neurons, scores = chosen(model, policy, of, earlier)
    guard = policy.guard(model, neurons, earlier)
    tuned = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    train(tuned, TOKENIZER, of, SPEC.model_copy(update={"max_steps": steps}), 0, guard=guard)
    overlay = tuned.base_model.overlay(neurons)
    tuned.base_model.unload()
    overlay.lay_on(model)
    return Learnt(of.name, neurons, scores, policy.remember(model, TOKENIZER, neurons, of, 16, 0))


def row_changes(model: nn.Module, before: dict[str, torch.Tensor], neurons: NeuronSet) -> dict[str, torch.Tensor]:
    """Module -> what learning has changed in its rows; Conv1D stores them the other way round."""
    found = {}
    for module, rows in neurons.rows().items():
        if rows.side == "row":
            change = model.get_submodule(module).weight.detach() - before[f"{module}.weight"]
            found[module] = change.T if type(model.get_submodule(module)).__name__ == "Conv1D" else change
    return found


# One family of each way to store weights: gated, Conv1D, fused, with biases.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_new_task_changes_rows_across_earlier_inputs_alone(family: str) -> None:
    model, policy = tiny_model(family), Functional(general=0, energy=0.99, memory=0.9, closed=0.45)
    first = learn(model, policy, FIRST, [])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    second = learn(model, policy, SECOND, [first])
    assert first.memory is not None
    changes = row_changes(model, before, second.neurons)
    assert changes
    for module, change in changes.items():
        group = first.memory.description["groups"][module]
        basis, energy = (first.memory.tensors[f"{group}/{name}"].float() for name in ("basis", "energy"))
        closed = int((energy.cumsum(0) < policy.energy * energy.sum()).sum()) + 1
        most = min(closed, int(policy.closed * basis.shape[1]))
        assert change.norm() > 1e-3
        # Halves are kept, so that a direction is off by a thousandth.
        assert (change @ basis[:most].T).norm() < 0.01 * change.norm()
        assert (change @ basis[most:].T).norm() > 0.01 * change.norm() or len(basis) == most


def test_outputs_on_earlier_inputs_move_by_less_than_the_bound() -> None:
    """The first layer's inputs stay, so what its rows compute there moves by at most |change|^2 times the energy that
    was left open."""
    model, policy = tiny_model(), Functional(general=0, energy=0.95, closed=0.9, memory=0.9)
    first = learn(model, policy, FIRST, [])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read = list(batches(TOKENIZER, FIRST.train, 8, 16))
    names = [part.module for part in first.neurons.space.sites[0].parts if part.side == "row"]
    seen = gather(model, names, read, 10_000).rows[names[0]].double()
    total = float(seen.square().sum())
    later = learn(model, policy, SECOND, [first])
    for name, change in row_changes(model, before, later.neurons).items():
        if name in names:
            moved = float((seen @ change.double().T).square().sum())
            open_energy = (1 - policy.energy**2) * total  # of what is kept, as much again is closed
            assert 0 < moved <= 1.02 * float(torch.linalg.matrix_norm(change, 2)) ** 2 * open_energy


def test_earlier_answers_move_less_than_under_exclusion() -> None:
    def moved(protected: bool) -> float:
        model, policy = tiny_model(), Functional(general=0, energy=0.99, closed=0.9, memory=0.9)
        first = learn(model, policy, FIRST, [], steps=30)
        read = next(batches(TOKENIZER, FIRST.train, 48, 16))
        before = model(**read).logits.detach()
        learn(model, policy, SECOND, [first if protected else replace(first, memory=None)], steps=30)
        return float((model(**read).logits - before).detach().square().mean())

    # Without the memory nothing is limited, and the choice is the same.
    assert moved(protected=True) < 0.5 * moved(protected=False)


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_memory_fits_in_its_share_of_the_overlay(share: float) -> None:
    model = tiny_model()
    neurons, _ = chosen(model, Functional(), FIRST, [])
    before = state_digest(model)
    memory = Functional(energy=0.999, memory=share).remember(model, TOKENIZER, neurons, FIRST, 16, 0)
    assert memory is not None
    assert state_digest(model) == before
    assert 0 < memory.bytes <= share * neurons.parameters * 4
    again = Functional(energy=0.999, memory=share).remember(model, TOKENIZER, neurons, FIRST, 16, 0)
    assert again is not None
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in memory.tensors.items())


def test_the_base_model_stands_for_a_task_before_the_first() -> None:
    model, space = tiny_model(), NeuronSpace.from_model(tiny_model())
    before = state_digest(model)
    policy = Functional(general=6, general_tokens=12)
    found = policy.before(model, TOKENIZER, space, 3)
    assert found is not None
    assert state_digest(model) == before
    assert len(found.neurons) == 0
    assert found.scores is not None
    assert policy.guard(model, space.all(), [found]) is not None
    assert Functional(general=0).before(model, TOKENIZER, space, 3) is None


def test_what_the_model_writes_is_drawn_by_the_seed() -> None:
    model, state = tiny_model(), torch.random.get_rng_state()
    one, same, other = (written_by(model, TOKENIZER, 10, 9, seed) for seed in (1, 1, 2))
    assert [tuple(batch["input_ids"].shape) for batch in one] == [(8, 9), (2, 9)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_modules_that_read_the_same_input_share_a_basis() -> None:
    model = tiny_model()
    neurons, _ = chosen(model, Functional(), FIRST, [])
    memory = Functional().remember(model, TOKENIZER, neurons, FIRST, 16, 0)
    assert isinstance(memory, Memory)
    groups = memory.description["groups"]
    assert groups["model.layers.0.mlp.up_proj"] == groups["model.layers.0.mlp.gate_proj"]
    assert len(set(groups.values())) == 4  # in each of two layers, gate and up, and down


def test_padding_counts_for_nothing() -> None:
    model = tiny_model()
    read = next(batches(TOKENIZER, FIRST.train[:4], 4))
    longer = {
        name: torch.cat([values, torch.full((4, 3), -100 if name == "labels" else 0)], 1)
        for name, values in read.items()
    }
    names = ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]
    one, other = (gather(model, names, [batch], 100) for batch in (read, longer))
    for name in names:
        assert torch.allclose(one.rows[name], other.rows[name], rtol=1e-4, atol=1e-6)


def test_tokens_that_predict_a_label_are_all_kept_and_weigh_half() -> None:
    model, read = tiny_model(), list(batches(TOKENIZER, FIRST.train, 8))
    name, predicting = "model.layers.0.mlp.gate_proj", 2 * len(FIRST.train)  # the label, and the end after it
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach()) and None
    )
    for batch in read:
        model(**batch)
    handle.remove()
    weighed = torch.cat(seen)
    labels = torch.cat([batch["labels"] for batch in read])
    at = torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], 1)
    assert int(at.sum()) == predicting
    second = (weighed[at].T @ weighed[at]) / predicting
    few = gather(model, [name], read, predicting).rows[name]
    assert torch.allclose(few.T @ few, second, rtol=1e-3, atol=1e-5)
    mask = torch.cat([batch["attention_mask"] for batch in read]).bool() & ~at
    both = gather(model, [name], read, 10_000).rows[name]
    whole = second / 2 + (weighed[mask].T @ weighed[mask]) / int(mask.sum()) / 2
    assert torch.allclose(both.T @ both, whole, rtol=1e-3, atol=1e-5)
    assert len(gather(model, [name], read, 30).rows[name]) == 30


def test_chosen_columns_do_not_change_along_what_earlier_tasks_fire() -> None:
    model, policy = tiny_model(), Functional(general=0, energy=0.99, closed=0.9, memory=0.9)
    first = learn(model, policy, FIRST, [])
    second = learn(model, policy, SECOND, [first])
    guard = policy.guard(model, second.neurons, [first])
    assert guard is not None
    name = "model.layers.0.mlp.down_proj"
    index = torch.from_numpy(second.neurons.rows()[name].positions.copy())
    fired = gather(model, [name], list(batches(TOKENIZER, FIRST.train, 8, 16)), 512).rows[name][:, index]
    change = torch.randn(len(index), 32, generator=torch.Generator().manual_seed(0))
    limited = guard.limits()[name](change)
    assert (fired @ limited).square().sum() < 0.05 * (fired @ change).square().sum()
    assert limited.norm() > 0.2 * change.norm()
    assert (guard.closed[name].basis @ limited).norm() < 1e-4 * limited.norm()


def test_a_column_moves_the_less_the_louder_its_neuron_is_outside_of_what_is_closed() -> None:
    model, policy = tiny_model(), Functional(general=0, energy=0.5, memory=0.1)
    first = learn(model, policy, FIRST, [])
    neurons, _ = chosen(model, policy, SECOND, [first])
    guard = policy.guard(model, neurons, [first])
    assert guard is not None
    name = "model.layers.0.mlp.down_proj"
    assert first.memory is not None
    heard = first.memory.tensors[f"{name}/channels"].float()[torch.from_numpy(neurons.rows()[name].positions.copy())]
    basis = first.memory.tensors[f"{name}/basis"].float()
    energy = first.memory.tensors[f"{name}/energy"]
    kept = ((basis * energy[:, None].sqrt()) ** 2).sum(0)[torch.from_numpy(neurons.rows()[name].positions.copy())]
    mean = first.memory.tensors[f"{name}/channels"].float().sum() / 64
    scale = guard.closed[name].scale
    assert scale is not None
    assert torch.allclose(scale, 1 / (1 + (heard - kept).clamp_min(0) / mean), rtol=0.01)
    assert 0 < float(scale.min()) < float(scale.max()) <= 1


@pytest.mark.parametrize("rows", [3, 20])
def test_leading_directions_carry_the_share_asked_for(rows: int) -> None:
    values = torch.tensor([6.0, 3.0, 1.0])
    draw = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draw)).Q[:, :3]
    right = torch.linalg.qr(torch.randn(8, 8, generator=draw)).Q[:3]
    seen = left @ torch.diag(values.sqrt()) @ right
    for share, count in ((0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.91, 3), (0.999, 3)):
        found = leading(seen, share, 4)
        assert len(found.basis) == count
        assert found.share == pytest.approx(float(values[:count].sum()) / 10)
        assert torch.allclose(found.basis @ found.basis.T, torch.eye(count, dtype=torch.float64), atol=1e-6)
    assert len(leading(seen, 0.999, 2).basis) == 2


def test_inputs_count_the_same_whatever_their_scale() -> None:
    parts = [leading(torch.tensor(rows), 0.9, 3).rows for rows in ([[10.0, 0, 0]], [[0, 0.1, 0]])]
    both = leading(torch.cat(parts), 0.9, 3, total=2.0)
    assert len(both.basis) == 2
    assert torch.allclose(both.basis[:, 2], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": 1.0}, "option 'energy' of 'functional' is 1.0"),
        ({"closed": 0}, "option 'closed' of 'functional' is 0"),
        ({"memory": 2}, "option 'memory' of 'functional' is 2"),
        ({"examples": 0}, "option 'examples' of 'functional' is 0"),
        ({"general": -1}, "option 'general' of 'functional' is -1"),
        ({"when_full": "no"}, "option 'when_full' of 'functional' is 'no'; it must be error, share or spill"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Functional(**options)
