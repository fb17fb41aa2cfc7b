"""Identity: what a run and each of its tasks compute, digested: by content, not by the names of files or a machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.config import MethodSpec, StreamConfig
from flows.setting import Setting
from neft.audit import base_fingerprint
from neft.encoding import tokenizer_fingerprint
from neft.evaluation import Probe
from neft.harness import HarnessProbe
from neft.neurons import NeuronSpace
from neft.protection import ProtectionPolicy
from neft.scoring import Scorer
from neft.strategies import contents
from neft.tasks import Task
from registry import Entry

#: Keys of `evaluation` that name general probes, which are known by their content instead.
_PROBES = {"general", "general_tokens", "harness", "harness_limit", "harness_include"}


def digest(description: Any) -> str:
    """SHA-256 of a JSON description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def task_seed(setting: Setting, task: Task) -> int:
    """Another seed for each task, or chance would repeat itself."""
    return int(digest([setting.config.seed, task.name])[:8], 16)


def evaluation_of(config: StreamConfig) -> dict[str, Any]:
    """How tasks are evaluated."""
    return config.evaluation.model_dump(mode="json", exclude=_PROBES)


@dataclass(frozen=True)
class Base:
    """Fingerprints of an untouched model, of its neuron space, and of its tokenizer."""

    model: str
    space: str
    tokenizer: str

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> Base:
        return cls(base_fingerprint(model), space.fingerprint, tokenizer_fingerprint(tokenizer))


def config_digest(
    config: StreamConfig,
    base: Base,
    tasks: Sequence[Task],
    scorer: Scorer,
    policy: ProtectionPolicy,
    probes: Sequence[Probe | HarnessProbe],
) -> str:
    """Identity of what a config's run computes."""
    return digest(
        {
            **_common(config, base, scorer, policy),
            "tasks": [[task.name, task.train_fingerprint, task.eval_fingerprint] for task in tasks],
            "evaluation": evaluation_of(config),
            "probes": [probe.fingerprint for probe in probes],
        }
    )


def run_digest(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what a run computes."""
    probes: tuple[Probe | HarnessProbe, ...] = (*setting.probes, *setting.harness)
    base = _base(setting, tokenizer)
    return config_digest(setting.config, base, setting.tasks, setting.scorer, setting.policy, probes)


def task_digest(
    setting: Setting, tokenizer: PreTrainedTokenizerBase, task: Task, parent: str, sources: Sequence[Entry]
) -> str:
    """Identity of what goes into learning a task.

    Args:
        parent: digest of the state that the task goes on from.
        sources: the entries that the task may start from.
    """
    inputs = {
        **_common(setting.config, _base(setting, tokenizer), setting.scorer, setting.policy),
        "parent": parent,
        "task": task.name,
        "data": task.train_fingerprint,
    }
    if sources:
        inputs["sources"] = [entry.input_digest for entry in sources]
    return digest(inputs)


def _base(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> Base:
    return Base(setting.base, setting.space.fingerprint, tokenizer_fingerprint(tokenizer))


def _common(config: StreamConfig, base: Base, scorer: Scorer, policy: ProtectionPolicy) -> dict[str, Any]:
    return {
        "base": base.model,
        "space": base.space,
        "tokenizer": base.tokenizer,
        "method": _method(config.method, scorer, policy),
        "training": config.training.model_dump(mode="json"),
        "seed": config.seed,
    }


def _method(method: MethodSpec, scorer: Scorer, policy: ProtectionPolicy) -> dict[str, Any]:
    """The method with the content of every file that a strategy reads in place of the file's name."""
    described = method.model_dump(mode="json")
    for key, strategy in (("scorer", scorer), ("protection", policy)):
        if read := contents(strategy):
            choice = described[key]
            described[key] = ({"name": choice} if isinstance(choice, str) else choice) | read
    return described
