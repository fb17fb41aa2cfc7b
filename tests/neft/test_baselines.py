"""Baselines: each makes a plain model that learned a task, in its own way."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from neft.audit import WeightAudit, state_digest, trained_weights
from neft.baselines import BASELINES, Baseline
from neft.baselines.ewc import fisher_diagonal
from neft.baselines.lora import Lora
from neft.encoding import batches, collate, encode
from neft.errors import InputError
from neft.neurons import NeuronSpace
from neft.rehearsal import kept
from neft.strategies import build
from neft.tasks import Example, Task
from neft.training import train
from neft.training_spec import TrainingSpec
from tests.tiny import ANIMALS, COLOURS, FAMILIES, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = tuple(
    Example(f"Text: {colour} {animal} Kind:", (" warm", " cold")[place % 2])
    for place, (colour, animal) in enumerate(zip(COLOURS * 2, ANIMALS * 2, strict=True))
)
TASK = Task("toy", ROWS, ROWS, "accuracy", (" warm", " cold"))
_OTHER_ROWS = tuple(Example(row.prompt, {" warm": " tame", " cold": " wild"}[row.completion]) for row in ROWS)
OTHER = Task("other", _OTHER_ROWS, _OTHER_ROWS, "accuracy", (" tame", " wild"))
SPEC = TrainingSpec(max_steps=12, learning_rate=0.02, max_length=16, per_device_train_batch_size=4)
FEW_STEPS = SPEC.model_copy(update={"max_steps": 2})
BATCH = collate([encode(TOKENIZER, example) for example in ROWS], 0)

FFN = ("gate_proj", "up_proj", "down_proj")
#: One row per baseline, in the words of a config, and which of a tiny Llama's weights it may train.
MATRIX: dict[str, tuple[Any, tuple[str, ...]]] = {
    "full": ("full", ("",)),
    "ffn": ("ffn", FFN),
    "hft": ("hft", ("_proj",)),
    "ewc": ({"name": "ewc", "weight": 100, "examples": 4}, ("",)),
    "replay": ({"name": "replay", "examples": 4, "share": 0.25}, ("",)),
    "lora": ({"name": "lora", "r": 4, "alpha": 8, "replay": 2}, ("_proj",)),
    "olora": ({"name": "olora", "r": 4, "alpha": 8, "weight": 0.01}, ("_proj",)),
    "osf": ({"name": "osf", "effective_rank": 0.25}, ("_proj",)),
    "single": ({"name": "single", "by": {"name": "lora", "r": 4}}, ("_proj",)),
    "joint": ({"name": "joint", "by": "ffn"}, FFN),
}
#: PEFT's OSF knows no Conv1D, of which GPT-2 is made.
RUNS = [(name, family) for name in MATRIX for family in ("llama", "gpt2") if (name, family) != ("osf", "gpt2")]


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(model.eval()(**BATCH).loss)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**BATCH).logits
    return found


def learn(
    baseline: Baseline, model: nn.Module, seed: int = 0, task: Task = TASK, spec: TrainingSpec = SPEC
) -> tuple[nn.Module, nn.Module]:
    """What the baseline trained, and the plain model it made of it."""
    prepared = baseline.prepare(model, seed)
    train(prepared, TOKENIZER, task, spec, seed, guard=baseline.guard(prepared))
    finished = baseline.finish(prepared)
    baseline.remember(finished, TOKENIZER, task, 16, seed)
    return prepared, finished


def lora_a(prepared: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in prepared.named_parameters() if ".lora_A." in name}


def made(choice: Any) -> Baseline:
    return build("baseline", BASELINES, choice)


def test_every_baseline_has_a_row() -> None:
    assert MATRIX.keys() == BASELINES.keys()
    assert all(baseline.name == name for name, baseline in BASELINES.items())


@pytest.mark.parametrize(("name", "family"), RUNS)
def test_a_plain_model_that_learned_comes_out(name: str, family: str) -> None:
    model = tiny_model(family)
    names, before = set(model.state_dict()), loss(model)
    _, finished = learn(made(MATRIX[name][0]), model)
    assert type(finished) is type(tiny_model(family))
    assert set(finished.state_dict()) == names
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in finished.parameters())
    # GPT-2's tied embeddings are small at random, which bounds its logits.
    assert loss(finished) < before - 0.3


@pytest.mark.parametrize("name", MATRIX)
def test_it_trains_the_weights_it_should_and_says_which(name: str) -> None:
    choice, endings = MATRIX[name]
    before, baseline, model = tiny_model().state_dict(), made(choice), tiny_model()
    audit = WeightAudit(model)
    prepared = baseline.prepare(model, 0)
    trained = trained_weights(prepared) & before.keys()
    train(prepared, TOKENIZER, TASK, FEW_STEPS, 0, guard=baseline.guard(prepared))
    finished = baseline.finish(prepared)
    changed = {key for key, tensor in finished.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == trained
    allowed = {key for key in before if key.removesuffix(".weight").endswith(endings)}
    assert changed < allowed if name == "hft" else changed == allowed
    result = audit.compare(finished, trained)
    assert result.identical
    assert result.parameters_outside == sum(before[key].numel() for key in before.keys() - changed)


@pytest.mark.parametrize("name", MATRIX)
def test_tasks_follow_one_another(name: str) -> None:
    baseline = made(MATRIX[name][0])
    _, first = learn(baseline, tiny_model(), spec=FEW_STEPS)
    digest = state_digest(first)
    prepared, second = learn(baseline, first, seed=1, spec=FEW_STEPS)
    assert any(parameter.numel() for parameter in prepared.parameters())
    assert type(second) is type(tiny_model())
    assert state_digest(second) != digest


@pytest.mark.parametrize("name", MATRIX)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    runs = (learn(made(MATRIX[name][0]), tiny_model(), seed, spec=FEW_STEPS) for seed in (0, 0, 1))
    digests = [state_digest(finished) for _, finished in runs]
    assert digests[0] == digests[1] != digests[2]


def test_full_trains_weights_that_were_frozen() -> None:
    model = tiny_model().requires_grad_(False)
    digest = state_digest(model)
    _, finished = learn(made("full"), model)
    assert state_digest(finished) != digest


def test_lora_is_merged_into_the_weights() -> None:
    baseline = Lora(r=4)
    prepared = baseline.prepare(tiny_model(), seed=0)
    assert isinstance(prepared, PeftModel)
    assert {parameter.shape[0] for name, parameter in prepared.named_parameters() if "lora_A" in name} == {4}
    train(prepared, TOKENIZER, TASK, SPEC, 0)
    with_adapter = logits(prepared)
    with prepared.disable_adapter():
        assert not torch.allclose(logits(prepared), with_adapter, atol=1e-2)
    finished = baseline.finish(prepared)
    torch.testing.assert_close(logits(finished), with_adapter, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in finished.named_modules())


def test_lora_starts_from_the_seed_alone() -> None:
    def matrices(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 3)  # whatever was drawn before
        prepared = Lora().prepare(tiny_model(), seed)
        return [parameter for name, parameter in prepared.named_parameters() if "lora_A" in name]

    first, again, other = matrices(0), matrices(0), matrices(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


# The half that is trained


@pytest.mark.parametrize("family", FAMILIES)
def test_hft_draws_half_of_each_blocks_matrices_anew_for_each_seed(family: str) -> None:
    def drawn(seed: int) -> set[str]:
        prepared = made("hft").prepare(tiny_model(family), seed)
        return {name for name, weight in prepared.named_parameters() if weight.requires_grad}

    everything = trained_weights(made("hft").prepare(tiny_model(family), 0))
    assert everything == drawn(0)
    assert len({frozenset(drawn(seed)) for seed in range(4)}) > 1
    # Blocks of three matrices round up and down by turns, and the tiny models have two of each block.
    blocks = NeuronSpace.from_model(tiny_model(family), ["ffn", "attention", "qk"])
    matrices = {f"{part.module}.weight" for site in blocks.sites for part in site.parts}
    assert drawn(0) < matrices and 2 * len(drawn(0)) == len(matrices)


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_trains_what_the_neurons_own(family: str) -> None:
    prepared = made("ffn").prepare(tiny_model(family), 0)
    trained = sum(weight.numel() for weight in prepared.parameters() if weight.requires_grad)
    assert trained == NeuronSpace.from_model(prepared, ["ffn"]).parameters


# Penalties


def test_olora_penalises_what_its_matrices_share_with_those_of_all_earlier_tasks() -> None:
    baseline, model = made({"name": "olora", "r": 2, "weight": 0.25}), tiny_model()
    assert baseline.guard(baseline.prepare(tiny_model(), 0)) is None
    old: list[dict[str, torch.Tensor]] = []
    for seed in (0, 1):
        prepared = baseline.prepare(model, seed)
        old.append({name: weight.detach().clone() for name, weight in lora_a(prepared).items()})
        model = baseline.finish(prepared)
    prepared = baseline.prepare(model, 2)
    shared = sum(
        float((earlier[name] @ new.detach().T).abs().sum()) for earlier in old for name, new in lora_a(prepared).items()
    )
    guard = baseline.guard(prepared)
    assert guard is not None
    penalty = guard.penalty(prepared, BATCH)
    assert penalty is not None and float(penalty.detach()) == pytest.approx(0.25 * shared, rel=1e-5)
    penalty.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in lora_a(prepared).values())


def test_olora_makes_the_matrices_more_orthogonal_than_lora_does() -> None:
    overlaps = []
    for weight in (1e-9, 0.05):
        baseline = made({"name": "olora", "r": 2, "weight": weight})
        _, model = learn(baseline, tiny_model(), seed=0)
        prepared = baseline.prepare(model, 1)
        guard = baseline.guard(prepared)
        assert guard is not None
        train(prepared, TOKENIZER, TASK, SPEC, 1, guard=guard)
        overlaps.append(float(guard.penalty(prepared, BATCH) or 0) / weight)
    assert overlaps[1] < 0.5 * overlaps[0]


def test_the_fisher_diagonal_is_the_mean_squared_gradient_of_a_completions_log_likelihood() -> None:
    model = tiny_model().requires_grad_(False)
    digest = state_digest(model)
    found = fisher_diagonal(model, list(batches(TOKENIZER, ROWS[:3], 1)))
    assert state_digest(model) == digest
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
    name, weight = "model.layers.1.mlp.down_proj.weight", model.model.layers[1].mlp.down_proj.weight
    expected = torch.zeros_like(weight)
    for example in ROWS[:3]:
        item = encode(TOKENIZER, example)
        weight.requires_grad_(True)
        probabilities = model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
        likelihood = sum(probabilities[place - 1, item.ids[place]] for place in range(item.start, len(item.ids)))
        expected += torch.autograd.grad(likelihood, weight)[0].square() / 3
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-7)


def test_ewc_pulls_back_to_the_newest_anchor_by_the_sum_of_fishers() -> None:
    model = tiny_model()
    baseline = made({"name": "ewc", "weight": 10, "examples": 3})
    assert baseline.guard(model) is None
    expected: dict[str, torch.Tensor] = {}
    for seed in (0, 1):
        with torch.no_grad():
            model.lm_head.weight += 0.1
        baseline.remember(model, TOKENIZER, TASK, 16, seed)
        sample = list(batches(TOKENIZER, random.Random(seed).sample(ROWS, 3), 1))
        expected = {name: expected.get(name, 0) + value for name, value in fisher_diagonal(model, sample).items()}
    guard = baseline.guard(model)
    assert guard is not None and float(guard.penalty(model, BATCH) or 0) == 0
    with torch.no_grad():
        for weight in model.requires_grad_(False).parameters():
            weight.add_(0.5)
    formula = 10 / 2 * sum(float(fisher.sum()) for fisher in expected.values()) * 0.5**2
    assert formula > 0
    assert float(guard.penalty(model, BATCH) or 0) == pytest.approx(formula, rel=1e-4)


def test_ewc_keeps_what_matters_to_earlier_tasks_nearer_to_what_it_was() -> None:
    moved = []
    for weight in (1e-9, 1e4):
        baseline = made({"name": "ewc", "weight": weight, "examples": 4})
        _, first = learn(baseline, tiny_model())
        guard = baseline.guard(first)
        assert guard is not None
        train(first.requires_grad_(True), TOKENIZER, OTHER, SPEC, 1, guard=guard)
        with torch.no_grad():
            moved.append(float(guard.penalty(first, BATCH) or 0) / weight)
    assert moved[1] < 0.2 * moved[0]


# Rehearsal


@pytest.mark.parametrize("choice", [{"name": "replay", "examples": 4}, {"name": "lora", "replay": 4}])
def test_what_is_rehearsed_is_kept_of_every_earlier_task(choice: Any) -> None:
    baseline = made(choice)
    assert baseline.guard(tiny_model()) is None
    baseline.remember(tiny_model(), TOKENIZER, TASK, 16, 0)
    baseline.remember(tiny_model(), TOKENIZER, OTHER, 16, 1)
    guard = baseline.guard(tiny_model())
    assert guard is not None
    rows = guard.rehearsed(24)
    assert len(rows) == 24
    assert set(rows) == set(kept(TASK, 4, 0) + kept(OTHER, 4, 1))


def test_lora_rehearses_nothing_unless_it_is_asked_to() -> None:
    baseline = made("lora")
    baseline.remember(tiny_model(), TOKENIZER, TASK, 16, 0)
    assert baseline.guard(tiny_model()) is None


# OSF


def test_osf_is_merged_into_the_weights_and_the_next_task_keeps_it() -> None:
    baseline = made("osf")
    prepared = baseline.prepare(tiny_model(), 0)
    untouched = logits(tiny_model())
    torch.testing.assert_close(logits(prepared), untouched, rtol=1e-4, atol=1e-4)
    train(prepared, TOKENIZER, TASK, SPEC, 0)
    wrapped = logits(prepared)
    assert not torch.allclose(wrapped, untouched, atol=1e-2)
    finished = baseline.finish(prepared)
    torch.testing.assert_close(logits(finished), wrapped, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(baseline.prepare(finished, 1)), wrapped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "frozen"), [(0.25, 8), (5, 5)])
def test_osf_trains_what_is_left_of_the_rank(rank: float, frozen: int) -> None:
    prepared = made({"name": "osf", "effective_rank": rank}).prepare(tiny_model(), 0)
    shapes = {name: weight.shape for name, weight in prepared.named_parameters() if weight.requires_grad}
    factor = next(shape for name, shape in shapes.items() if "layers.0.mlp.up_proj" in name and "U_low" in name)
    assert factor == (64, 32 - frozen)


def test_osf_refuses_a_model_without_linear_layers() -> None:
    with pytest.raises(InputError, match=r"baseline 'osf' trains nn\.Linear layers alone"):
        made("osf").prepare(tiny_model("gpt2"), 0)


# Courses


@pytest.mark.parametrize("name", ["single", "joint"])
def test_another_baseline_learns_for_it_and_remembers_nothing(name: str) -> None:
    baseline = made({"name": name, "by": {"name": "lora", "r": 3, "replay": 2}})
    assert baseline.course == name
    prepared = baseline.prepare(tiny_model(), 0)
    assert {weight.shape[0] for weight in lora_a(prepared).values()} == {3}
    baseline.remember(baseline.finish(prepared), TOKENIZER, TASK, 16, 0)
    assert baseline.guard(baseline.prepare(tiny_model(), 0)) is None


@pytest.mark.parametrize("by", ["ewc", "joint", {"name": "lora", "rank": 2}])
def test_a_baseline_that_needs_earlier_tasks_cannot_learn_for_another(by: Any) -> None:
    with pytest.raises(InputError, match="baseline for 'single' to learn by"):
        made({"name": "single", "by": by})
