"""The settings of masked SFT, as a config words them; importable without TRL."""

from __future__ import annotations

from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from neft.errors import nearest
from neft.tasks import Spec


class TrainingSpec(Spec):
    """Masked SFT. Names and meanings are those of TRL's `SFTConfig`, caching's and early stopping's aside."""

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
    torch_compile: bool = Field(False, description="compile the model")
    cache_frozen_layers: bool = Field(
        False,
        description="keep the hidden states that enter the lowest trained layer in memory, so that the layers below "
        "run once for each example, not once an epoch (with `method.selection.lowest_layer`)",
    )
    logging_steps: int = Field(5, gt=0, description="steps between points of the training curves")
    early_stopping_patience: int | None = Field(
        None, gt=0, description="stop after so many looks at held-out loss without a better one, and keep the best"
    )
    eval_steps: int = Field(20, gt=0, description="steps between looks at held-out loss, with early stopping")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the training rows held out for early stopping (never evaluation rows)"
    )

    @field_validator("lr_scheduler_type", "optim")
    @classmethod
    def _known_to_transformers(cls, value: str, info: ValidationInfo) -> str:
        known = [each.value for each in (SchedulerType if info.field_name == "lr_scheduler_type" else OptimizerNames)]
        if value not in known:
            raise ValueError(f"transformers has no {value!r}; {nearest(value, known)}")
        return value

    @model_validator(mode="after")
    def _constant_below(self) -> Self:
        clashes = {
            "packing": "mixes examples anew",
            "neftune_noise_alpha": "changes what enters the layers",
            "torch_compile": "fixes which layers run",
        }
        for name, reason in clashes.items():
            if self.cache_frozen_layers and getattr(self, name):
                raise ValueError(f"`cache_frozen_layers` does not go with `{name}`, which {reason}; give one of them")
        return self
