"""A comparison as one Prefect flow: its cells in processes of their own, learning rates first, then the rest."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import yaml
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.cell import FAILED
from flows.comparison import Cell, Comparison
from flows.environment import mlflow_uri
from flows.home import Home
from flows.processes import EndedError, Processes
from flows.progress import say
from flows.tracking import Tracker
from flows.tuning import Ledger, choose
from neft.errors import FailedError


@dataclass
class Outcome:
    """How a comparison went: cells learnt before, learnt now, failed and why, and not begun since the time was over."""

    known: list[str] = field(default_factory=list)
    learnt: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class Campaign:
    """A comparison while its flow goes on."""

    def __init__(self, comparison: Comparison, ledger: Ledger, jobs: int, seconds: float | None):
        self.comparison, self.ledger, self.jobs = comparison, ledger, jobs
        self.outcome = Outcome()
        self.processes = Processes()
        self.cells: dict[str, Cell] = {}
        self.environment: dict[str, str] = {}
        self._total = len(comparison.first()) + len(comparison.unknown({}))
        self._start = time.monotonic()
        self._until = None if seconds is None else self._start + seconds
        self._said = threading.Lock()

    def learn(self) -> None:
        """Learn what is not learnt yet: first every learning rate on the first order and seed, then all the rest."""
        self._learn(self.comparison.first())
        chosen = choose(self.comparison, self.ledger, self.outcome.failed)
        for method, rate in chosen.items():
            if len(self.comparison.rates(method)) > 1:
                say(f"{method}: learning rate {rate:g} learnt best")
        self._learn(self.comparison.rest(chosen))
        untried = {cell.method for cell in self.comparison.first() if cell.name in self.outcome.left}
        for name in self.comparison.unknown(chosen):
            if name.partition(".")[0] in untried:
                self.outcome.left.append(f"{self.comparison.name}.{name}")
            else:
                self.outcome.failed[f"{self.comparison.name}.{name}"] = "every learning rate of its method failed"

    def _learn(self, cells: Sequence[Cell]) -> None:
        new = [cell for cell in cells if not self.ledger.learnt(cell)]
        self.outcome.known += [cell.name for cell in cells if cell not in new]
        self.cells |= {cell.name: cell for cell in new}
        for future in [learn_cell.submit(cell.name) for cell in new]:
            future.wait()

    def run(self, cell: Cell) -> None:
        """Learn a cell in a process of its own, which ends the cell alone when it crashes.

        Raises:
            FailedError: one of its streams was not learnt.
        """
        if self._until is not None and time.monotonic() > self._until:
            self.outcome.left.append(cell.name)
            return
        start = time.monotonic()
        try:
            reason = _process(cell, self.environment, self.processes)
        except EndedError:
            self.outcome.left.append(cell.name)
            return
        with self._said:
            if reason is None:
                self.outcome.learnt.append(cell.name)
            else:
                self.outcome.failed[cell.name] = reason
            self._say(cell.name, time.monotonic() - start, reason)
        if reason is not None:
            raise FailedError(f"{cell.name}: {reason}")

    def _say(self, name: str, seconds: float, reason: str | None) -> None:
        tried = len(self.outcome.learnt) + len(self.outcome.failed)
        done = tried + len(self.outcome.known)
        left = (time.monotonic() - self._start) / tried * (self._total - done)
        state = "learnt" if reason is None else "failed"
        say(f"[{done}/{self._total}] {name}: {state} in {_duration(seconds)}, about {_duration(left)} left for all")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _process(cell: Cell, environment: dict[str, str], processes: Processes) -> str | None:
    """Run the cell's process; why it failed, or None.

    Raises:
        EndedError: the comparison was ended before.
    """
    folder = Home.find().path / "compare" / cell.streams[0].tracking.tags["neft.compare"]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for config in cell.streams:
        path = folder / f"{config.stream}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        paths.append(str(path))
    log = folder / f"{cell.name}.log"
    with log.open("w") as out:
        code = processes.run([sys.executable, "-m", "flows.cell", *paths], out, os.environ | environment)
    if code == 0:
        return None
    said = [
        line.removeprefix(FAILED) for line in log.read_text(errors="replace").splitlines() if line.startswith(FAILED)
    ]
    return "; ".join(said) or f"its process {_ended(code)}; see {log}"


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


_CAMPAIGN: ContextVar[Campaign] = ContextVar("neft_campaign")


@task(task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def learn_cell(name: str) -> None:
    """Learn one cell of the comparison."""
    campaign = _CAMPAIGN.get()
    campaign.run(campaign.cells[name])


@flow(name="neft-compare", flow_run_name="{compare}", persist_result=False)
def learn_cells(compare: str) -> None:
    """Learn the cells of a comparison."""
    campaign = _CAMPAIGN.get()
    with get_client(sync_client=True) as client:
        # The server of this flow serves the cells too: one of their own each would cost seconds and a database's locks.
        campaign.environment["PREFECT_API_URL"] = str(client.api_url).rstrip("/")
    # Here, since Prefect sets its own handler of SIGTERM for as long as a flow runs.
    with campaign.processes.ended_by_signals():
        campaign.learn()
    if failed := campaign.outcome.failed:
        raise FailedError("\n".join(f"{name} failed: {reason}" for name, reason in failed.items()))


def learn_comparison(comparison: Comparison, ledger: Ledger, jobs: int, seconds: float | None) -> Outcome:
    """Learn a comparison, or go on with it.

    Args:
        jobs: processes at once; each gets its share of the cores.
        seconds: begin no new cell after so many.
    """
    home = Home.find()
    uri = mlflow_uri(comparison.config, home)
    artifacts = None if uri.startswith(("http://", "https://")) else home.mlflow_artifacts
    # Made here, since two cells that begin at once would both make it.
    Tracker(uri, comparison.experiment, artifacts)
    campaign = Campaign(comparison, ledger, jobs, seconds)
    threads = str(max(1, _cores() // jobs))
    campaign.environment |= {"NEFT_HOME": str(home.path), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    token = _CAMPAIGN.set(campaign)
    try:
        runner = cast(TaskRunner[PrefectFuture[Any]], ThreadPoolTaskRunner(max_workers=jobs))
        learn_cells.with_options(task_runner=runner)(comparison.name)
    except FailedError:
        if not campaign.outcome.failed:
            raise
    finally:
        _CAMPAIGN.reset(token)
    return campaign.outcome


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
