"""Masked SFT: TRL's SFTTrainer over a task's examples, loss on completions only."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from neft.encoding import encode
from neft.errors import FailedError, InputError
from neft.frozen_layers import FrozenLayers
from neft.guard import Guard, Limiter
from neft.losses import completion_loss
from neft.tasks import Example, Task
from neft.training_spec import TrainingSpec
from neft.tuner.model import trained_rows

Model = PreTrainedModel | PeftModel

#: Called with the step and the values of one log entry: loss, learning_rate, grad_norm, ...
OnLog = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did: optimiser steps, seconds, mean training loss, and bytes of hidden states kept."""

    steps: int
    seconds: float
    loss: float
    cached_bytes: int = 0


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    spec: TrainingSpec,
    seed: int,
    on_log: OnLog | None = None,
    guard: Guard | None = None,
) -> TrainingResult:
    """Fine-tune the trainable parameters of `model`, in place, on a task's training data.

    Args:
        model: a PEFT model whose adapter is to be trained, or a plain model to train whole.
        guard: what stands beside the training, so that earlier tasks are kept.
        on_log: called with each point of the training curves, and at the end with `cached_bytes`, if any are kept.

    Raises:
        FailedError: the loss or a trained parameter is not finite.
        InputError: settings that TRL or transformers refuse, or `cache_frozen_layers` for a model that has no frozen
            layers below the trained ones, or drops out in them.
    """
    learner = cast(Model, model)
    training, validation = _split(task.train, spec, seed)
    if guard is not None:
        training = (*training, *guard.rehearsed(len(training)))
    frozen = FrozenLayers(learner) if spec.cache_frozen_layers else None
    with tempfile.TemporaryDirectory(prefix="neft-training-") as folder, _as_configured(learner):
        callbacks: list[TrainerCallback] = [_Progress(task.name, on_log)]
        if spec.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(spec.early_stopping_patience))
        limiter = Limiter(trained_rows(learner), guard.limits()) if guard is not None else None
        if limiter is not None:
            callbacks.append(_Limited(limiter))
        try:
            trainer = _CompletionTrainer(
                model=learner,
                args=_arguments(spec, seed, Path(folder)),
                train_dataset=_dataset(tokenizer, training, spec.max_length),
                eval_dataset=_dataset(tokenizer, validation, spec.max_length, len(training)) if validation else None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        except ValueError as error:
            raise InputError(f"training: {str(error).strip().splitlines()[0]}") from error
        if frozen is not None:
            trainer.frozen, trainer.data_collator = frozen, _Numbered(trainer.data_collator)
        trainer.guard = guard
        # The trainer's own bar also prints every log entry; ours does not.
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        with limiter.gradients() if limiter is not None else nullcontext():
            outcome = trainer.train()
        seconds = time.perf_counter() - start
    _check_finite(model, task, outcome.training_loss)
    cached = frozen.bytes if frozen is not None else 0
    if cached and on_log is not None:
        on_log(outcome.global_step, {"cached_bytes": cached})
    return TrainingResult(outcome.global_step, seconds, outcome.training_loss, cached)


class _Numbered:
    """TRL's collator, and beside its tensors the number and the length of each row's example."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        # Plain lists stay on the CPU, where they are read.
        named = {"examples": [row["example"] for row in rows], "lengths": [len(row["input_ids"]) for row in rows]}
        return self.collate(rows) | named


class _CompletionTrainer(SFTTrainer):
    """SFTTrainer that, on the CPU, runs the language model's head only where a completion is predicted.

    TRL does so where there is Triton, and elsewhere scores every token of the prompt too: a third of a step, for a
    small model with a large vocabulary.
    """

    #: The layers that need not run again for an example that was seen.
    frozen: FrozenLayers | None = None
    #: What stands beside the training.
    guard: Guard | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if self.frozen is None:
            return self._guarded_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.frozen.batch(inputs.pop("examples"), inputs.pop("lengths")):
            return self._guarded_loss(model, inputs, return_outputs, num_items_in_batch)

    def _guarded_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: Any) -> Any:
        penalty = self.guard.penalty(model, inputs) if self.guard is not None and model.training else None
        result = self._loss(model, inputs, return_outputs, items)
        if penalty is None:
            return result
        # The batches of one step are added up, and a penalty counts once a step.
        penalty = penalty / self.args.gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def _loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if self.args.device.type != "cpu" or return_outputs or self.label_smoother is not None or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, count = completion_loss(model, inputs)
        if num_items_in_batch is None:
            return loss / count
        # The count is that of all processes, whose gradients DDP then averages.
        return loss / num_items_in_batch * self.accelerator.num_processes


class _Limited(TrainerCallback):
    """Keeps trained rows within a guard's limits."""

    def __init__(self, limiter: Limiter):
        self.limiter = limiter

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.limiter.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.limiter.after_step()


class _Progress(TrainerCallback):
    """One bar with the loss and an estimate, on a terminal; the training curves to whoever listens."""

    def __init__(self, name: str, on_log: OnLog | None):
        self.name, self.receive = name, on_log
        self.bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(total=state.max_steps, desc=f"training {self.name}", leave=False, disable=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if self.bar is not None and "loss" in values:
            self.bar.set_postfix(loss=f"{values['loss']:.3f}")
        if self.receive is not None:
            self.receive(state.global_step, values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


#: What TRL and transformers take over from the tokenizer, or switch for training, in a model's configs.
_SET_IN_CONFIGS = ("use_cache", "pad_token_id", "bos_token_id", "eos_token_id")


@contextmanager
def _as_configured(model: Model) -> Iterator[None]:
    """Undo what training sets on a model besides its weights: modes, configs, checkpointing, hooks, gradients.

    TRL and accelerate also replace `forward` on the model itself (a fused head, autocast for bf16), for good.
    """
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    values = [{name: getattr(config, name) for name in _SET_IN_CONFIGS if hasattr(config, name)} for config in configs]
    modules = [
        (module, module.training, vars(module).get("forward"), set(module._forward_hooks)) for module in model.modules()
    ]
    checkpointing = model.is_gradient_checkpointing
    try:
        yield
    finally:
        for config, before in zip(configs, values, strict=True):
            for name, value in before.items():
                setattr(config, name, value)
        if not checkpointing:
            model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.zero_grad(set_to_none=True)
        for module, training, forward, hooks in modules:
            module.training = training
            # Input gradients are asked for more than once, and the model remembers the last hook alone.
            for hook in set(module._forward_hooks) - hooks:
                del module._forward_hooks[hook]
            vars(module).pop("forward", None)
            vars(module).pop("_original_forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


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


def _dataset(
    tokenizer: PreTrainedTokenizerBase, examples: tuple[Example, ...], max_length: int, first: int = 0
) -> Dataset:
    """Rows of token ids, labels, and the example's number, from `first` up."""
    encoded = [encode(tokenizer, example, max_length) for example in examples]
    return Dataset.from_dict(
        {
            "input_ids": [list(item.ids) for item in encoded],
            "labels": [item.labels for item in encoded],
            "example": list(range(first, first + len(encoded))),
        }
    )


#: Fields of `TrainingSpec` that are not `SFTConfig`'s own, or need another word there.
_OURS = {"early_stopping_patience", "eval_steps", "validation_fraction", "max_steps", "cache_frozen_layers"}


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
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=spec.max_steps or -1,
        seed=seed,
        report_to="none",
        # A diverging loss must be seen, not averaged away.
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # The examples' numbers are for our collator; TRL's takes what it knows.
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
        **spec.model_dump(exclude=_OURS),
        **watched,
    )
    # With several devices in one process the trainer would copy the model (nn.DataParallel), and the layers' state.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


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
