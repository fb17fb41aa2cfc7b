"""The `keystone` policy: no task trains the base model's keystones, or every task trains nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.errors import FailedError, InputError
from neft.keystone import KeystoneSearch
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.policy import Candidates, Learnt, ProtectionPolicy, without
from neft.scoring.scores import Scores


@dataclass(frozen=True)
class KeystoneGuard(KeystoneSearch, ProtectionPolicy):
    """Keeps the base model's keystones out of every task's choice; with `only`, leaves nothing but them.

    Keystone neurons (arXiv 2605.24846). `earlier` says whether earlier tasks' neurons are kept out too, as by
    `exclude`, or not, as by `none`. By default they are, but not with `only`, where few neurons must do for all tasks.
    """

    only: bool = False
    earlier: Literal["exclude", "none"] | None = None

    name: ClassVar[str] = "keystone"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.only, bool):
            raise InputError(f"option 'only' of 'keystone' is {self.only!r}; it must be true or false")
        if self.earlier not in ("exclude", "none", None):
            raise InputError(f"option 'earlier' of 'keystone' is {self.earlier!r}; it must be exclude or none")

    def reserve(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> NeuronSet:
        found = self.find(model, tokenizer, space).neurons
        if self.only and not found:
            raise FailedError(
                f"method.protection trains keystones only, but no neuron is in the top {self.rho:g} of every "
                f"capability of {self.prompts}; raise its option rho, or name fewer capabilities"
            )
        return found

    def candidates(self, scores: Scores, earlier: Sequence[Learnt], reserved: NeuronSet) -> Candidates:
        reserved.check_space(scores.space)
        free = reserved if self.only else scores.space.all() - reserved
        shared = self.only if self.earlier is None else self.earlier == "none"
        return Candidates(free if shared else without(free, earlier), scores)
