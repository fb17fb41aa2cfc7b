"""Masked SFT: what the loss counts, the settings that reach TRL, and that nothing but weights is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig

from neft import training
from neft.audit import Audit, state_digest
from neft.encoding import IGNORED, collate, encode
from neft.errors import FailedError, InputError
from neft.evaluation import EvaluationSpec, evaluate
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.tasks import Example, Task, TaskSpec, load_task
from neft.training import TrainingResult, train
from neft.training_spec import TrainingSpec
from neft.tuner import NeftConfig
from tests.tiny import ANIMALS, CAUSAL, COLOURS, FILLERS, tiny_model, tiny_tokenizer, write_stream

TOKENIZER = tiny_tokenizer()
PAD = 0

#: Completions of one and of three tokens, so that means over batches and over tokens differ.
ROWS = tuple(
    Example(f"Text: {colour} {animal} {' '.join(FILLERS[: place % 4])} Kind:", (" warm", " cold wild tame")[place % 2])
    for place, (colour, animal) in enumerate(zip(COLOURS * 2, ANIMALS * 2, strict=True))
)
TASK = Task("toy", ROWS, ROWS, "accuracy", (" warm", " cold wild tame"))


def spec(**changes: Any) -> TrainingSpec:
    defaults = {"max_steps": 4, "learning_rate": 0.02, "max_length": 32, "per_device_train_batch_size": 4}
    return TrainingSpec.model_validate(defaults | changes)


def some_neurons(model: nn.Module) -> NeuronSet:
    space = NeuronSpace.from_model(model)
    return NeuronSet(space, {site.name: range(0, site.size, 2) for site in space.sites})


def adapted(model: PreTrainedModel) -> tuple[PeftModel, NeuronSet]:
    neurons = some_neurons(model)
    return get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM")), neurons


def learnt(seed: int = 0, task: Task = TASK, model: PreTrainedModel | None = None, **changes: Any) -> Overlay:
    """The overlay that training some neurons of a tiny model gives."""
    peft_model, neurons = adapted(model or tiny_model())
    train(peft_model, TOKENIZER, task, spec(**changes), seed)
    overlay: Overlay = peft_model.base_model.overlay(neurons)
    return overlay


def equal(first: Overlay, second: Overlay) -> bool:
    return all(torch.equal(values, second.values[name]) for name, values in first.values.items())


def whole(**changes: Any) -> tuple[PreTrainedModel, TrainingResult]:
    """A tiny model trained whole."""
    model = tiny_model()
    return model, train(model, TOKENIZER, TASK, spec(**changes), 0)


@contextmanager
def watched() -> Iterator[list[tuple[bool, torch.Tensor, torch.Tensor]]]:
    """(training, input_ids, labels) of each batch that a loss is computed of."""
    seen: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
    real = training._CompletionTrainer.compute_loss

    def look(self: Any, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        seen.append((model.training, inputs["input_ids"].clone(), inputs["labels"].clone()))
        return real(self, model, inputs, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._CompletionTrainer, "compute_loss", look)
        yield seen


def rows_of(seen: list[tuple[bool, torch.Tensor, torch.Tensor]], training: bool = True) -> set[tuple[Any, ...]]:
    """The (ids, labels) of every row seen in training (or not), without padding."""
    return {
        (tuple(ids[ids != PAD].tolist()), tuple(labels[ids != PAD].tolist()))
        for mode, batch_ids, batch_labels in seen
        if mode is training
        for ids, labels in zip(batch_ids, batch_labels, strict=True)
    }


def encoded_rows(examples: tuple[Example, ...] = ROWS, max_length: int | None = None) -> set[tuple[Any, ...]]:
    encoded = [encode(TOKENIZER, example, max_length) for example in examples]
    return {(item.ids, tuple(item.labels)) for item in encoded}


# What the loss counts


def test_every_setting_is_one_of_sft_config() -> None:
    ours = {"early_stopping_patience", "validation_fraction", "cache_frozen_layers"}
    assert set(TrainingSpec.model_fields) - ours <= set(SFTConfig.__dataclass_fields__)
    assert not ours & set(SFTConfig.__dataclass_fields__)


@pytest.mark.parametrize("max_length", [32, 5])
def test_the_trainer_is_given_every_row_as_it_was_encoded(max_length: int) -> None:
    model = tiny_model()
    with watched() as seen:
        train(model, TOKENIZER, TASK, spec(max_steps=3, max_length=max_length), 0)
    assert rows_of(seen) == encoded_rows(max_length=max_length)
    for _, ids, labels in seen:
        assert (labels[ids == PAD] == IGNORED).all()
        assert ((labels == ids) | (labels == IGNORED)).all()


@pytest.mark.parametrize(("size", "accumulation"), [(12, 1), (4, 3), (3, 4)])
def test_one_step_of_sgd_follows_the_mean_over_completion_tokens(size: int, accumulation: int) -> None:
    """Whatever the batches and however long the completions: the gradient is that of one loss over all their tokens."""
    model = tiny_model()
    batch = collate([encode(TOKENIZER, example) for example in ROWS], PAD)
    reference = copy.deepcopy(model)
    logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED).backward()
    train(
        model,
        TOKENIZER,
        TASK,
        spec(
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        ),
        0,
    )
    for name, parameter in reference.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": None, "num_train_epochs": 2}, 6),  # 12 rows, 4 in a batch
        ({"max_steps": None, "num_train_epochs": 0.5}, 2),
        ({"max_steps": None, "num_train_epochs": 2, "gradient_accumulation_steps": 3}, 2),
        ({"max_steps": 1, "num_train_epochs": 9}, 1),
    ],
)
def test_steps_are_counted_by_max_steps_or_epochs(changes: dict[str, Any], steps: int) -> None:
    result = whole(**changes)[1]
    assert result.steps == steps
    assert result.seconds > 0
    assert 0 < result.loss < 20


def test_packing_puts_several_rows_in_one_sequence_and_counts_the_same_tokens() -> None:
    model = tiny_model()
    with watched() as seen:
        result = train(model, TOKENIZER, TASK, spec(packing=True, max_steps=None, num_train_epochs=1), 0)
    counted = sum(int((labels != IGNORED).sum()) for _, _, labels in seen)
    assert counted == sum(len([label for label in labels if label != IGNORED]) for _, labels in encoded_rows())
    assert result.steps < 3


# What it learns


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("stream")
    write_stream(folder, tasks=1)
    files = {"train": folder / "colours-train.jsonl", "eval": folder / "colours-eval.jsonl"}
    return load_task(
        TaskSpec.model_validate(
            {
                "name": "colours",
                "data": {"files": files},
                "prompt": "Text: {text} Kind:",
                "completion": " {label}",
                "labels": ["warm", "cold"],
            }
        )
    )


def test_a_task_is_learnt_by_its_neurons_alone(colours: Task) -> None:
    model = tiny_model()
    majority, neurons = colours.majority, some_neurons(model)
    audit, before = Audit(model, neurons), evaluate(model, TOKENIZER, colours, EvaluationSpec()).value
    peft_model, _ = adapted(model)
    train(peft_model, TOKENIZER, colours, spec(max_steps=60, per_device_train_batch_size=8), 0)
    learnt_score = evaluate(peft_model, TOKENIZER, colours, EvaluationSpec()).value
    overlay = peft_model.base_model.overlay(neurons)
    base = peft_model.unload()
    assert evaluate(base, TOKENIZER, colours, EvaluationSpec()).value == before
    overlay.lay_on(base)
    assert audit.compare(base).identical
    assert evaluate(base, TOKENIZER, colours, EvaluationSpec()).value == learnt_score
    assert majority is not None
    assert learnt_score > max(majority, before) + 0.1


@pytest.mark.parametrize("family", CAUSAL)
def test_every_causal_family_is_trained_by_its_neurons_alone(family: str) -> None:
    model = tiny_model(family)
    digest, audit = state_digest(model), Audit(model, some_neurons(model))
    overlay = learnt(model=model, max_steps=2)
    base = tiny_model(family)
    before = overlay.lay_on(base)
    assert audit.compare(base).identical
    assert all(not torch.equal(values, before.values[name]) for name, values in overlay.values.items())
    before.lay_on(base)
    assert state_digest(base) == digest


# Repeatable


def test_the_same_seed_gives_the_same_rows_bit_for_bit_and_another_does_not() -> None:
    first, again, other = learnt(0), learnt(0), learnt(1)
    assert equal(first, again)
    assert not equal(first, other)


def test_the_global_generator_does_not_matter() -> None:
    first = learnt(0)
    torch.manual_seed(1234)
    peft_model, neurons = adapted(model := tiny_model())
    torch.rand(99)
    train(peft_model, TOKENIZER, TASK, spec(), 0)
    assert equal(first, peft_model.base_model.overlay(neurons))
    assert model is peft_model.get_base_model()


@pytest.fixture(scope="module")
def plain() -> Overlay:
    """What training gives by the settings of `spec` alone."""
    return learnt()


def test_how_it_is_computed_does_not_change_what_is_learnt(plain: Overlay) -> None:
    changed = learnt(gradient_checkpointing=True)
    for name, values in plain.values.items():
        torch.testing.assert_close(changed.values[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"bf16": True},
        {"weight_decay": 0.5},
        {"lr_scheduler_type": "constant"},
        {"warmup_steps": 2},
        {"warmup_steps": 0.5},
        {"label_smoothing_factor": 0.2},
        {"neftune_noise_alpha": 5.0},
        {"max_grad_norm": 0.01},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_epsilon": 0.1},
        {"optim": "adafactor"},
        {"learning_rate": 0.01},
    ],
    ids=str,
)
def test_every_setting_reaches_the_training(change: dict[str, Any], plain: Overlay) -> None:
    changed = learnt(**change)
    assert not equal(plain, changed)
    assert {values.dtype for values in changed.values.values()} == {torch.float32}
    assert all(torch.isfinite(values).all() for values in changed.values.values())


def test_weight_decay_does_not_move_other_weights() -> None:
    model = tiny_model()
    digest = state_digest(model)
    peft_model, _ = adapted(model)
    train(peft_model, TOKENIZER, TASK, spec(weight_decay=0.5), 0)
    assert state_digest(peft_model.unload()) == digest


# Early stopping


def held_out_loss(model: nn.Module, examples: list[Example]) -> float:
    """Mean over rows' batches of one of the completion tokens' loss: every row here has as many of them."""
    batch = collate([encode(TOKENIZER, example) for example in examples], PAD)
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: adapted(model)[0]], ids=["whole", "neurons"])
def test_early_stopping_keeps_the_best_and_never_trains_on_the_rows_it_looks_at(
    prepare: Callable[[PreTrainedModel], nn.Module],
) -> None:
    rows = tuple(
        Example(f"Text: {colour} {animal} Kind:", (" warm", " cold")[(place + 1) % 2])
        for place, (colour, animal) in enumerate((c, a) for c in COLOURS for a in ANIMALS)
    )
    model = tiny_model()
    learner = prepare(model)
    looks: list[float] = []
    settings = spec(
        max_steps=60,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        early_stopping_patience=2,
        eval_steps=2,
        validation_fraction=0.25,
    )
    task = replace(TASK, train=rows)
    with watched() as seen:
        result = train(
            learner,
            TOKENIZER,
            task,
            settings,
            0,
            lambda _, values: looks.append(values["eval_loss"]) if "eval_loss" in values else None,
        )
    trained, looked = rows_of(seen), rows_of(seen, training=False)
    assert len(looked) == 9
    assert not trained & looked
    assert trained | looked <= encoded_rows(rows)
    assert len(looks) == result.steps / 2
    assert result.steps < 60
    assert min(looks) not in looks[-2:]
    held_out = [row for row in rows if (encode(TOKENIZER, row).ids, tuple(encode(TOKENIZER, row).labels)) in looked]
    assert held_out_loss(learner, held_out) == pytest.approx(min(looks), rel=1e-3)


def test_early_stopping_needs_rows_to_hold_out() -> None:
    with pytest.raises(InputError, match=r"holds 1 rows out for validation, but the task has 1; give more rows"):
        train(tiny_model(), TOKENIZER, replace(TASK, train=ROWS[:1]), spec(early_stopping_patience=1), 0)


# Curves


def test_the_curves_are_told_with_their_steps() -> None:
    points: list[tuple[int, Mapping[str, float]]] = []
    model, _ = adapted(tiny_model())
    train(model, TOKENIZER, TASK, spec(max_steps=6, logging_steps=2), 0, lambda *point: points.append(point))
    curve = [(step, values["loss"], values["learning_rate"]) for step, values in points if "loss" in values]
    assert [step for step, *_ in curve] == [2, 4, 6]
    assert curve[-1][1] < curve[0][1]
    assert curve[0][2] > curve[-1][2] > 0
    assert all(isinstance(value, float) for _, values in points for value in values.values())


# Failure


@pytest.mark.parametrize("rate", [1e30, 1e20])
def test_divergence_is_a_failure_and_the_base_comes_back_bit_for_bit(rate: float) -> None:
    model = tiny_model()
    digest = state_digest(model)
    peft_model, _ = adapted(model)
    with pytest.raises(FailedError, match=r"'toy': training diverged.*lower training\.learning_rate"):
        train(peft_model, TOKENIZER, TASK, spec(learning_rate=rate, max_steps=6), 0)
    assert state_digest(peft_model.unload()) == digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_scheduler_type": "linaer"}, "transformers has no 'linaer'; did you mean 'linear'?"),
        ({"optim": "adamw_troch"}, "transformers has no 'adamw_troch'; did you mean 'adamw_torch'?"),
        ({"max_steps": 0}, "greater than 0"),
        ({"learning-rate": 1.0}, "Extra inputs"),
    ],
)
def test_a_word_that_transformers_does_not_know_is_refused_before_anything_is_trained(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        spec(**changes)


def test_what_trl_refuses_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Settings clash.\nA long explanation.")

    monkeypatch.setattr(training, "_CompletionTrainer", refuse)
    with pytest.raises(InputError, match=r"^training: Settings clash\.$"):
        train(tiny_model(), TOKENIZER, TASK, spec(), 0)


# Nothing left behind


def condition(model: nn.Module) -> dict[str, Any]:
    """Everything about a model but its weights that training could change."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "forward": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "config": base.config.to_dict(),
        "generation": base.generation_config.to_dict(),
        "checkpointing": base.is_gradient_checkpointing,
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "dtypes": {parameter.dtype for parameter in model.parameters()},
    }


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"neftune_noise_alpha": 5.0}]
)
@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: adapted(model)[0]], ids=["whole", "neurons"])
def test_training_changes_weights_and_nothing_else(
    prepare: Callable[[PreTrainedModel], nn.Module], changes: dict[str, Any]
) -> None:
    base = tiny_model()
    base.config.pad_token_id = None
    base.generation_config.pad_token_id = None
    model = prepare(base)
    before = condition(model)
    train(model, TOKENIZER, TASK, spec(max_steps=2, **changes), 0)
    assert condition(model) == before


def test_a_model_trained_whole_in_bf16_runs_in_float32_again() -> None:
    model, _ = whole(bf16=True, max_steps=2)
    fresh = tiny_model()
    fresh.load_state_dict(model.state_dict())
    batch = collate([encode(TOKENIZER, example) for example in ROWS], PAD)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)


def test_an_interrupted_training_leaves_the_model_in_its_condition_too() -> None:
    model, _ = adapted(tiny_model())
    before = condition(model)

    def interrupt(step: int, values: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, TOKENIZER, TASK, spec(logging_steps=1, gradient_checkpointing=True), 0, interrupt)
    assert condition(model) == before
