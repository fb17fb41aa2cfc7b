"""Setting: what a stream is learnt from and by, as it stays throughout a run."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config import StreamConfig
from flows.courses import COURSES, Sequential
from flows.standing import Standing
from neft.audit import base_fingerprint
from neft.baselines import BASELINES, Baseline
from neft.evaluation import Probe, load_probes
from neft.harness import HarnessProbe, load_harness
from neft.neurons import NeuronSpace
from neft.protection import POLICIES, ProtectionPolicy
from neft.scoring import SCORERS, Scorer
from neft.strategies import build
from neft.tasks import Task, load_task


@dataclass(frozen=True)
class Setting:
    """A stream's data and strategies, and the neurons of its base model.

    Attributes:
        lessons: what is learnt, in order: the tasks, unless the course has it otherwise.
        base: fingerprint of the base model.
    """

    config: StreamConfig
    tasks: tuple[Task, ...]
    lessons: tuple[Task, ...]
    probes: tuple[Probe, ...]
    harness: tuple[HarnessProbe, ...]
    scorer: Scorer
    policy: ProtectionPolicy
    baseline: Baseline | None
    course: Sequential
    space: NeuronSpace
    base: str


def load(config: StreamConfig) -> tuple[Setting, Standing]:
    """Load data and model, and find the neurons. Data comes first: its mistakes are found in a second."""
    tasks = tuple(load_task(spec, config.seed) for spec in config.tasks)
    probes, harness = load_probes(config.evaluation), load_harness(config.evaluation)
    scorer = build("scorer", SCORERS, config.method.scorer)
    policy = build("protection policy", POLICIES, config.method.protection)
    chosen = config.method.baseline
    baseline = build("baseline", BASELINES, chosen) if chosen is not None else None
    course = COURSES[baseline.course if baseline is not None else "sequential"]()
    lessons = course.lessons(tasks)
    standing = Standing(config.model)
    config.check_lengths(getattr(standing.model.config, "max_position_embeddings", None))
    space = NeuronSpace.from_model(standing.model, config.method.kinds, config.model.neurons)
    base = base_fingerprint(standing.model)
    course.open(standing.model)
    setting = Setting(config, tasks, lessons, probes, harness, scorer, policy, baseline, course, space, base)
    return setting, standing
