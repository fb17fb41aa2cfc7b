"""The harness probe: accuracy on tasks of the LM Evaluation Harness, measured on the model as it is in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.errors import InputError
from neft.evaluation import EvaluationSpec
from neft.modes import in_evaluation

#: What the harness calls accuracy; where a task has both, the first.
ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True)
class HarnessProbe:
    """A task of the harness, or a group of tasks. `fingerprint` is that of its questions and of how they are asked."""

    name: str
    fingerprint: str
    batch_size: int
    limit: int | None
    manager: Any = field(repr=False, compare=False)

    def accuracy(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[float, int]:
        """Accuracy, and over how many questions; the model and the generators of random numbers are left as they were.

        Raises:
            InputError: the harness gives no accuracy for it.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with in_evaluation(model), _undisturbed():
            results = lm_eval.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size),
                tasks=[self.name],
                task_manager=self.manager,
                limit=self.limit,
                # No standard errors, which would take 100,000 draws, and no seeds: nothing is drawn but from its own.
                bootstrap_iters=0,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
                log_samples=False,
            )
        found = results["results"].get(self.name, {}) | results.get("groups", {}).get(self.name, {})
        for metric in ACCURACIES:
            if f"{metric},none" in found:
                return float(found[f"{metric},none"]), sum(each["effective"] for each in results["n-samples"].values())
        raise InputError(
            f"evaluation.harness: {self.name!r} has no accuracy (acc or acc_norm); name a task that has one"
        )


def load_harness(spec: EvaluationSpec) -> tuple[HarnessProbe, ...]:
    """Find the harness's tasks that a config names, and read their questions.

    Raises:
        InputError: the harness is not installed, or a task is unknown or cannot be loaded.
    """
    if not spec.harness:
        return ()
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"evaluation.harness names tasks of the LM Evaluation Harness, which cannot be imported ({error}); install "
            "it by `pip install 'neft[lm-eval]'`, or remove evaluation.harness"
        ) from error
    include = spec.harness_include
    if include is not None and not include.exists():
        raise InputError(f"evaluation.harness_include: no such folder: {include}; give the folder of your tasks' YAML")
    path = str(include) if include is not None else None
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(spec.harness) <= set(manager.all_tasks):
        # The harness's own tasks are thousands of files, which take seconds to look through.
        manager = TaskManager(include_path=path)
    probes = []
    for name in spec.harness:
        if name not in manager.all_tasks:
            raise InputError(
                f"evaluation.harness: unknown task {name!r}; `lm-eval ls tasks` lists the harness's own, and "
                "evaluation.harness_include is the folder of yours"
            )
        try:
            with _undisturbed():
                tasks = manager.load([name])["tasks"]
        except (OSError, ValueError) as error:
            raise InputError(
                f"evaluation.harness: {name!r} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        described = {each: _described(task, spec.harness_limit) for each, task in sorted(tasks.items())}
        content = json.dumps([lm_eval.__version__, spec.harness_limit, described], sort_keys=True, default=str)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()
        probes.append(HarnessProbe(name, fingerprint, spec.batch_size, spec.harness_limit, manager))
    return tuple(probes)


def _described(task: Any, limit: int | None) -> dict[str, Any]:
    """A task's settings and questions; where its data lie is no part of what it asks."""
    settings = task.dump_config()
    for key in ("dataset_path", "dataset_kwargs", "metadata"):
        settings.pop(key, None)
    return {"settings": settings, "questions": list(task.eval_docs)[:limit]}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Inside, the harness does not warn that a model is in memory; outside, generators of random numbers are unused.

    It draws names by Python's generator.
    """
    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)
