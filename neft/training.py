"""Masked SFT: TRL's SFTTrainer over a task's examples, loss on completions only."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import Field
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from neft.encoding import encode
from neft.errors import FailedError, InputError
from neft.tasks import Example, Spec, Task

#: Called with the step and the values of one log entry: loss, learning_rate, grad_norm, ...
OnLog = Callable[[int, Mapping[str, float]], None]


class TrainingSpec(Spec):
    """Masked SFT. Names and meanings are those of TRL's `SFTConfig`, early stopping's aside."""

    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data, when `max_steps` is not given")
    max_steps: int | None = Field(None, gt=0, description="optimiser steps, instead of epochs")
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    lr_scheduler_type: str = Field("linear", description="schedule, by its name in transformers")
    warmup_steps: float = Field(0, ge=0, description="warm-up steps; below 1, their share of all steps")
    per_device_train_batch_size: int = Field(8, gt=0, description="examples in a batch on one device")
    gradient_accumulation_steps: int = Field(1, gt=0, description="batches that make one step")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward, to save memory")
    bf16: bool = Field(False, description="run in bfloat16 by autocast")
    max_length: int = Field(512, gt=1, description="tokens of an example; the beginning of a longer prompt is cut")
    packing: bool = Field(False, description="put several examples into one sequence (needs FlashAttention)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay, on the chosen rows alone")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first beta")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second beta")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm to clip at; 0 for none")
    optim: str = Field("adamw_torch", description="optimiser, by its name in transformers")
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="noise on the embeddings (NEFTune)")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that load batches")
    torch_compile: bool = Field(False, description="compile the model")
    logging_steps: int = Field(5, gt=0, description="steps between points of the training curves")
    early_stopping_patience: int | None = Field(
        None, gt=0, description="stop after so many looks at held-out loss without a better one, and keep the best"
    )
    eval_steps: int = Field(20, gt=0, description="steps between looks at held-out loss, with early stopping")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows held out for early stopping (never evaluation rows)"
    )


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did: optimiser steps, seconds, and the mean training loss."""

    steps: int
    seconds: float
    loss: float


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    spec: TrainingSpec,
    seed: int,
    on_log: OnLog | None = None,
) -> TrainingResult:
    """Fine-tune the trainable parameters of `model`, in place, on a task's training data.

    Args:
        model: a PEFT model whose adapter is to be trained, or a plain model to train whole.
        on_log: called with each point of the training curves.

    Raises:
        FailedError: the loss or a trained parameter is not finite.
        InputError: settings that TRL or transformers refuse.
    """
    training, validation = _split(task.train, spec, seed)
    with tempfile.TemporaryDirectory(prefix="neft-training-") as folder:
        callbacks: list[TrainerCallback] = [_LogCallback(on_log)] if on_log else []
        if spec.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(spec.early_stopping_patience))
        try:
            trainer = SFTTrainer(
                model=model,
                args=_arguments(spec, seed, Path(folder)),
                train_dataset=_dataset(tokenizer, training, spec.max_length),
                eval_dataset=_dataset(tokenizer, validation, spec.max_length) if validation else None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        except ValueError as error:
            raise InputError(f"training: {str(error).strip().splitlines()[0]}") from error
        start = time.perf_counter()
        outcome = trainer.train()
        seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    _check_finite(model, task, outcome.training_loss)
    return TrainingResult(outcome.global_step, seconds, outcome.training_loss)


class _LogCallback(TrainerCallback):
    """Passes the points of the training curves on as they are logged."""

    def __init__(self, receive: OnLog):
        self.receive = receive

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self.receive(state.global_step, values)


def _split(
    examples: tuple[Example, ...], spec: TrainingSpec, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Training rows, and those held out of them for early stopping."""
    if spec.early_stopping_patience is None:
        return examples, ()
    count = max(1, round(len(examples) * spec.validation_fraction))
    if count >= len(examples):
        raise InputError(
            f"training.early_stopping_patience holds {count} rows out for validation, but the task has "
            f"{len(examples)}; give more rows, or lower training.validation_fraction"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(examples[place] for place in order[count:]), tuple(examples[place] for place in order[:count])


def _dataset(tokenizer: PreTrainedTokenizerBase, examples: tuple[Example, ...], max_length: int) -> Dataset:
    encoded = [encode(tokenizer, example, max_length) for example in examples]
    return Dataset.from_dict(
        {"input_ids": [list(item.ids) for item in encoded], "labels": [item.labels for item in encoded]}
    )


#: Fields of `TrainingSpec` that are not `SFTConfig`'s own, or need another word there.
_OURS = {"early_stopping_patience", "eval_steps", "validation_fraction", "max_steps"}


def _arguments(spec: TrainingSpec, seed: int, folder: Path) -> SFTConfig:
    watched: dict[str, Any] = {"save_strategy": "no"}
    if spec.early_stopping_patience is not None:
        watched = {
            "eval_strategy": "steps",
            "eval_steps": spec.eval_steps,
            "save_strategy": "steps",
            "save_steps": spec.eval_steps,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "per_device_eval_batch_size": spec.per_device_train_batch_size,
        }
    return SFTConfig(
        output_dir=str(folder),
        max_steps=spec.max_steps or -1,
        seed=seed,
        report_to="none",
        # A diverging loss must be seen, not averaged away.
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **spec.model_dump(exclude=_OURS),
        **watched,
    )


def _check_finite(model: nn.Module, task: Task, loss: float) -> None:
    broken = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not torch.isfinite(parameter).all()
    ]
    if broken or not math.isfinite(loss):
        raise FailedError(
            f"task {task.name!r}: training diverged (loss {loss}, {len(broken)} trained tensors not finite); "
            "lower training.learning_rate, or raise training.warmup_steps"
        )
