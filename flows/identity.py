"""Identity: what a run and each of its tasks compute, digested: by content, not by the names of files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flows.config import StreamConfig
from flows.setting import Setting
from neft.encoding import tokenizer_fingerprint
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


def run_digest(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what a run computes."""
    return digest(
        {
            **_common(setting, tokenizer),
            "tasks": [[task.name, task.train_fingerprint, task.eval_fingerprint] for task in setting.tasks],
            "evaluation": evaluation_of(setting.config),
            "probes": [probe.fingerprint for probe in (*setting.probes, *setting.harness)],
        }
    )


def task_digest(
    setting: Setting, tokenizer: PreTrainedTokenizerBase, task: Task, parent: str, sources: Sequence[Entry]
) -> str:
    """Identity of what goes into learning a task.

    Args:
        parent: digest of the state that the task goes on from.
        sources: the entries that the task may start from.
    """
    inputs = {
        **_common(setting, tokenizer),
        "parent": parent,
        "task": task.name,
        "data": task.train_fingerprint,
    }
    if sources:
        inputs["sources"] = [entry.input_digest for entry in sources]
    return digest(inputs)


def _common(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "base": setting.base,
        "space": setting.space.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "method": _method(setting),
        "training": setting.config.training.model_dump(mode="json"),
        "seed": setting.config.seed,
    }


def _method(setting: Setting) -> dict[str, Any]:
    """The method with the content of every file that a strategy reads in place of the file's name."""
    described = setting.config.method.model_dump(mode="json")
    for key, strategy in (("scorer", setting.scorer), ("protection", setting.policy)):
        if read := contents(strategy):
            choice = described[key]
            described[key] = ({"name": choice} if isinstance(choice, str) else choice) | read
    return described
