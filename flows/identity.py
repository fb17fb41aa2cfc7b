"""Identity: what a stream run computes, by content and not by the names of files; the same on every machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.config import MethodSpec, StreamConfig
from neft.audit import base_fingerprint
from neft.encoding import tokenizer_fingerprint
from neft.evaluation import Probe
from neft.harness import HarnessProbe
from neft.neurons import NeuronSpace
from neft.protection import ProtectionPolicy
from neft.scoring import Scorer
from neft.strategies import contents
from neft.tasks import Task

#: Keys of `evaluation` that name general probes, which are known by their content instead.
_PROBES = {"general", "general_tokens", "harness", "harness_limit", "harness_include"}


def digest(description: Any) -> str:
    """SHA-256 of a JSON description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Base:
    """Fingerprints of an untouched model, of its neuron space, and of its tokenizer."""

    model: str
    space: str
    tokenizer: str

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> Base:
        return cls(base_fingerprint(model), space.fingerprint, tokenizer_fingerprint(tokenizer))

    def to_dict(self) -> dict[str, str]:
        """The fingerprints as identities have them."""
        return {"base": self.model, "space": self.space, "tokenizer": self.tokenizer}


def config_digest(
    config: StreamConfig,
    base: Base,
    tasks: Sequence[Task],
    scorer: Scorer,
    policy: ProtectionPolicy,
    probes: Sequence[Probe | HarnessProbe],
) -> str:
    """Identity of what a run computes."""
    return digest(
        base.to_dict()
        | {
            "tasks": [[task.name, task.train_fingerprint, task.eval_fingerprint] for task in tasks],
            "method": method_identity(config.method, scorer, policy),
            "training": config.training.model_dump(mode="json"),
            "evaluation": evaluation_identity(config),
            "probes": [probe.fingerprint for probe in probes],
            "seed": config.seed,
        }
    )


def method_identity(method: MethodSpec, scorer: Scorer, policy: ProtectionPolicy) -> dict[str, Any]:
    """The method with the content of every file that a strategy reads in place of the file's name."""
    described = method.model_dump(mode="json")
    for key, strategy in (("scorer", scorer), ("protection", policy)):
        if read := contents(strategy):
            choice = described[key]
            described[key] = ({"name": choice} if isinstance(choice, str) else choice) | read
    return described


def evaluation_identity(config: StreamConfig) -> dict[str, Any]:
    """How tasks are scored; the general probes are known by their content."""
    return config.evaluation.model_dump(mode="json", exclude=_PROBES)
