"""Baselines: each makes a plain model that learned a task, in its own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from neft.audit import state_digest
from neft.baselines import BASELINES
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

#: One row per baseline, in the words of a config, and which of a tiny Llama's weights it trains.
MATRIX: dict[str, tuple[Any, tuple[str, ...]]] = {
    "full": ("full", ("",)),
    "lora": ({"name": "lora", "r": 4, "alpha": 8}, ("_proj",)),
}


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(model.eval()(**BATCH).loss)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**BATCH).logits
    return found


def learnt(choice: Any, model: PreTrainedModel, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """What the baseline trained, and the plain model it made of it."""
    baseline = build("baseline", BASELINES, choice)
    prepared = baseline.prepare(model, seed)
    train(prepared, TOKENIZER, TASK, SPEC, seed)
    return prepared, baseline.finish(prepared)


def test_every_baseline_has_a_row() -> None:
    assert MATRIX.keys() == BASELINES.keys()
    assert all(baseline.name == name for name, baseline in BASELINES.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", MATRIX)
def test_a_plain_model_that_learned_comes_out(name: str, family: str) -> None:
    model = tiny_model(family)
    names, before = set(model.state_dict()), loss(model)
    _, finished = learnt(MATRIX[name][0], model)
    assert type(finished) is type(tiny_model(family))
    assert set(finished.state_dict()) == names
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in finished.parameters())
    # GPT-2's tied embeddings are small at random, which bounds its logits.
    assert loss(finished) < before - 0.3


@pytest.mark.parametrize("name", MATRIX)
def test_it_trains_the_weights_it_should(name: str) -> None:
    choice, endings = MATRIX[name]
    before = tiny_model().state_dict()
    _, finished = learnt(choice, tiny_model())
    changed = {key for key, tensor in finished.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {key for key in before if key.removesuffix(".weight").endswith(endings)}


@pytest.mark.parametrize("name", MATRIX)
def test_tasks_follow_one_another(name: str) -> None:
    _, first = learnt(MATRIX[name][0], tiny_model())
    digest = state_digest(first)
    prepared, second = learnt(MATRIX[name][0], first)
    assert any(parameter.numel() for parameter in prepared.parameters())
    assert type(second) is type(tiny_model())
    assert state_digest(second) != digest


@pytest.mark.parametrize("name", MATRIX)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    digests = [state_digest(learnt(MATRIX[name][0], tiny_model(), seed)[1]) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_full_trains_weights_that_were_frozen() -> None:
    model = tiny_model().requires_grad_(False)
    digest = state_digest(model)
    _, finished = learnt("full", model)
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
