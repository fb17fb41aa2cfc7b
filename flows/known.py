"""What is known of a comparison that was learnt on other machines: runs that a file keeps, by their identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows.config import StreamConfig
from flows.identity import Base, config_digest
from flows.results import Result, kept_results
from neft.evaluation import Probe, load_probes
from neft.harness import HarnessProbe, load_harness
from neft.models import load_base
from neft.neurons import NeuronSpace
from neft.protection import POLICIES
from neft.scoring import SCORERS
from neft.strategies import build
from neft.tasks import Task, TaskSpec, load_task


@dataclass
class Known:
    """Finished runs of one comparison, found by all that a stream run computes: model, data, method and seed."""

    results: Mapping[str, Result]
    _bases: dict[str, Base] = field(default_factory=dict)
    _tasks: dict[str, Task] = field(default_factory=dict)
    _probes: dict[str, tuple[Probe | HarnessProbe, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, experiment: str) -> Known:
        """The runs that a file keeps of a comparison.

        Raises:
            InputError: no such file, or it keeps no results.
        """
        return cls({result.config_digest: result for result in kept_results(path).get(experiment, ())})

    def metrics(self, config: StreamConfig) -> Mapping[str, float] | None:
        """Continual-learning metrics of a run that computed what `config` asks for; None if none did."""
        if not self.results:
            return None
        found = self.results.get(self.identity(config))
        if found is None:
            return None
        start = "continual/"
        return {name.removeprefix(start): value for name, value in found.metrics.items() if name.startswith(start)}

    def identity(self, config: StreamConfig) -> str:
        """What a run of `config` computes, as the run itself tags it in MLflow."""
        scorer = build("scorer", SCORERS, config.method.scorer)
        policy = build("protection policy", POLICIES, config.method.protection)
        tasks = [self._task(spec, config.seed) for spec in config.tasks]
        return config_digest(config, self._base(config), tasks, scorer, policy, self._general(config))

    def _general(self, config: StreamConfig) -> tuple[Probe | HarnessProbe, ...]:
        key = config.evaluation.model_dump_json()
        if key not in self._probes:
            self._probes[key] = (*load_probes(config.evaluation), *load_harness(config.evaluation))
        return self._probes[key]

    def _task(self, spec: TaskSpec, seed: int) -> Task:
        key = f"{spec.model_dump_json()} {seed}"
        if key not in self._tasks:
            self._tasks[key] = load_task(spec, seed)
        return self._tasks[key]

    def _base(self, config: StreamConfig) -> Base:
        key = f"{config.model.model_dump_json()} {config.method.kinds}"
        if key not in self._bases:
            model, tokenizer = load_base(config.model.name, config.model.dtype)
            space = NeuronSpace.from_model(model, config.method.kinds, config.model.neurons)
            self._bases[key] = Base.of(model, tokenizer, space)
        return self._bases[key]
