"""Baselines: each makes a plain model that learned a task, in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from neft.audit import WeightAudit, state_digest, trained_weights
from neft.baselines import BASELINES, Baseline
from neft.baselines.lora import Lora
from neft.encoding import collate, encode
from neft.strategies import build
from neft.tasks import Example, Task
from neft.training import train
from neft.training_spec import TrainingSpec
from tests.tiny import ANIMALS, COLOURS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = tuple(
    Example(f"Text: {colour} {animal} Kind:", (" warm", " cold")[place % 2])
    for place, (colour, animal) in enumerate(zip(COLOURS * 2, ANIMALS * 2, strict=True))
)
TASK = Task("toy", ROWS, ROWS, "accuracy", (" warm", " cold"))
SPEC = TrainingSpec(max_steps=12, learning_rate=0.02, max_length=16, per_device_train_batch_size=4)
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


def learn(baseline: Baseline, model: nn.Module, seed: int = 0, task: Task = TASK) -> tuple[nn.Module, nn.Module]:
    """What the baseline trained, and the plain model it made of it."""
    prepared = baseline.prepare(model, seed)
    train(prepared, TOKENIZER, task, SPEC, seed, guard=baseline.guard(prepared))
    finished = baseline.finish(prepared)
    baseline.remember(finished, TOKENIZER, task, 16, seed)
    return prepared, finished


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
    train(prepared, TOKENIZER, TASK, SPEC, 0, guard=baseline.guard(prepared))
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
    _, first = learn(baseline, tiny_model())
    digest = state_digest(first)
    prepared, second = learn(baseline, first, seed=1)
    assert any(parameter.numel() for parameter in prepared.parameters())
    assert type(second) is type(tiny_model())
    assert state_digest(second) != digest


@pytest.mark.parametrize("name", MATRIX)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    digests = [state_digest(learn(made(MATRIX[name][0]), tiny_model(), seed)[1]) for seed in (0, 0, 1)]
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
