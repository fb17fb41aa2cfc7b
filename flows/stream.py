"""The stream as Prefect flows: tasks in order, each loaded, scored, given a set, trained, evaluated and recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec

from prefect import Task, flow, runtime, task
from prefect.cache_policies import NO_CACHE

from flows.config import StreamConfig, validate_config
from flows.environment import mlflow_uri
from flows.home import Home
from flows.progress import say
from flows.registries import Where
from flows.tracking import Tracker
from flows.workbench import Workbench, current, on
from neft.errors import NeftError

_P = ParamSpec("_P")


def _step(run_name: str) -> Callable[[Callable[_P, None]], Task[_P, None]]:
    """A Prefect task that is neither cached nor kept: what was done is decided by the registry alone.

    Steps take names alone; the model stays on the workbench and never passes through Prefect.
    """
    return task(task_run_name=run_name, cache_policy=NO_CACHE, persist_result=False)


@_step("load")
def load() -> None:
    """Load the model and the tasks' data."""
    current().load()


@_step("score {name}")
def score(name: str) -> None:
    """Score the neurons for a task."""
    current().score()


@_step("select {name}")
def select(name: str) -> None:
    """Choose a task's neurons."""
    current().select()


@_step("train {name}")
def train(name: str) -> None:
    """Train a task's neurons and audit that nothing else changed, or learn it by the configured baseline."""
    current().train()


@_step("evaluate after {name}")
def evaluate(name: str) -> None:
    """Evaluate the model as it stands on every task of the stream."""
    current().evaluate()


@_step("record {name}")
def record(name: str) -> None:
    """Record a task's entry in the registry."""
    current().record()


@_step("check out every state")
def prove() -> None:
    """Check out every state that the oracle goes back to, and measure it again."""
    current().prove()


@flow(name="neft-task", flow_run_name="{name}", persist_result=False)
def learn_task(position: int, name: str) -> None:
    """Learn one task of the stream, unless this very work is recorded; one that fails leaves the model as it was."""
    bench = current()
    bench.begin(position)
    if bench.recall() or bench.recall_skipped():
        evaluate(name)
        return
    bench.open_task()
    try:
        if bench.learner.selects:
            score(name)
            select(name)
        train(name)
    except NeftError as error:
        bench.roll_back()
        if not bench.may_skip(error):
            raise
        bench.skip(error)
        evaluate(name)
        return
    evaluate(name)
    record(name)


@flow(name="neft-stream", flow_run_name="{stream}", persist_result=False)
def learn_stream(stream: str, config: dict[str, Any]) -> int:
    """Learn a stream's tasks in order; returns the registry's id of the run.

    Args:
        stream: the stream's name.
        config: a stream's config, as `StreamConfig.model_dump(mode="json")` gives it.
    """
    parsed = validate_config(config, f"stream {stream}")
    home = Home.find()
    uri = mlflow_uri(parsed, home)
    registry = Where.of(parsed.registry).open()
    artifacts = None if uri.startswith(("http://", "https://")) else home.mlflow_artifacts
    tracker = Tracker(uri, parsed.tracking.experiment or parsed.stream, artifacts)
    bench = Workbench(parsed, registry, tracker, str(runtime.flow_run.id or "") or None)
    try:
        with on(bench):
            return _learn(bench, parsed)
    finally:
        registry.close()


def _learn(bench: Workbench, config: StreamConfig) -> int:
    load()
    if not bench.open_run():
        left_out = f", but for {', '.join(each.task for each in bench.skipped)}, skipped" if bench.skipped else ""
        say(f"stream {config.stream!r} is learnt already (run {bench.run.id}{left_out}): nothing to do")
        return bench.run.id
    try:
        bench.reserve()
        bench.sign()
        evaluate("nothing")
        for position, lesson in enumerate(bench.setting.lessons):
            learn_task(position, lesson.name)
        if "oracle" in bench.measuring.modes.matrices:
            prove()
        bench.finish()
    except BaseException as error:
        bench.fail(error)
        raise
    return bench.run.id
