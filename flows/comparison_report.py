"""A comparison's report: each method's metrics with their spread, and what differs by more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.comparison import ALONE
from flows.results import Result, chosen, learning_accuracies
from neft.errors import InputError, nearest
from neft.statistics import Difference, Share, Spread, paired, share, spread

#: Metric in MLflow -> its short name, and how many of it make the unit shown.
SCORES = {
    "continual/average_accuracy": "AA",
    "continual/learning_accuracy": "LA",
    "continual/backward_transfer": "BWT",
    "continual/forgetting": "forgetting",
    "continual/forward_transfer": "FWT",
    "continual/general_delta": "general delta",
    "routed/average_accuracy": "AA routed",
    "routed/backward_transfer": "BWT routed",
    "routed/accuracy": "routing",
    "oracle/backward_transfer": "BWT oracle",
}
COSTS = {
    "cost/training_seconds": ("training s", 1.0),
    "cost/seconds": ("all s", 1.0),
    "cost/peak_memory_bytes": ("peak MB", 1e6),
    "cost/stored_bytes_per_task": ("stored MB/task", 1e6),
}

#: Learning accuracies that differ by more than this are not matched.
MATCHED = 0.02

_NOISE = (
    "mean and sample standard deviation over orders and seeds. A * marks a difference to {against} beyond noise: the "
    "95 % t-interval of the mean difference, paired by order and seed, leaves zero out; with fewer than two pairs "
    "nothing is marked."
)


@dataclass(frozen=True)
class Line:
    """A method's results: at which learning rate, what was measured, and how it differs from the reference."""

    method: str
    rate: float
    tried: Mapping[float, float]
    metrics: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    shares: Mapping[str, Share]


@dataclass(frozen=True)
class Report:
    """A comparison's lines, one a method, and the method that the others are compared with."""

    experiment: str
    against: str
    lines: Sequence[Line]
    separate: bool


def report_of(experiment: str, results: Sequence[Result], against: str | None = None) -> Report:
    """
    Args:
        against: the method to compare with; default: the first.

    Raises:
        InputError: `against` is none of the methods.
    """
    picked = chosen(results)
    against = against or next(iter(picked))
    if against not in picked:
        raise InputError(f"--against {against!r} is no method of {experiment!r}; {nearest(against, picked)}")
    lines = [_line(results, method, own, picked[against]) for method, own in picked.items()]
    return Report(experiment, against, lines, any(result.order == ALONE for result in results))


def _line(results: Sequence[Result], method: str, own: Sequence[Result], reference: Sequence[Result]) -> Line:
    metrics = {name: list(_values(own, name).values()) for name in [*SCORES, *COSTS, "perplexity_rise"]}
    differences = {}
    for name in SCORES:
        gap = paired(_values(own, name), _values(reference, name))
        if gap is not None and own[0].method != reference[0].method:
            differences[name] = gap
    return Line(
        method,
        own[0].rate,
        learning_accuracies([result for result in results if result.method == method]),
        {name: spread(values) for name, values in metrics.items() if values},
        differences,
        _shares(own, reference) if own[0].order == ALONE else {},
    )


_Key = tuple[str, int, tuple[str, ...]]


def _values(results: Sequence[Result], metric: str) -> dict[_Key, float]:
    """(order, seed, tasks) -> the metric, of the runs that have it."""
    return {
        (result.order, result.seed, result.tasks): result.metrics[metric]
        for result in results
        if metric in result.metrics
    }


def _shares(own: Sequence[Result], reference: Sequence[Result]) -> dict[str, Share]:
    """The score as a share of the reference's, task by task and seed by seed; plain, and above the majority class."""
    metric = "continual/average_accuracy"
    scores, others = _values(own, metric), _values(reference, metric)
    chance = {
        (result.order, result.seed, result.tasks): sum(result.majority.values()) / len(result.tasks)
        for result in [*reference, *own]
    }
    found = {"plain": share(scores, others), "above chance": share(scores, others, chance)}
    return {name: value for name, value in found.items() if value is not None}


def as_json(report: Report, results: Sequence[Result]) -> dict[str, Any]:
    """Everything that the table says, and every run that it says it of."""
    methods = {}
    for line in report.lines:
        described = asdict(line)
        for name, gap in line.differences.items():
            described["differences"][name]["beyond_noise"] = gap.beyond_noise
        methods[line.method] = described | {"tried": {f"{rate:g}": score for rate, score in line.tried.items()}}
    return {
        "experiment": report.experiment,
        "against": report.against,
        "methods": methods,
        "runs": [result.to_dict() for result in results],
    }


def as_table(report: Report) -> RenderableType:
    """The scores, the costs, and what to mind."""
    parts: list[RenderableType] = [_scores(report), Text(_NOISE.format(against=report.against)), Text("")]
    parts += [_costs(report)]
    if report.separate:
        parts += [Text(""), _share_table(report)]
    notes = [*_rates(report), *_unmatched(report)]
    return Group(*parts, Text("\n".join(["", *notes])) if notes else Text(""))


def _scores(report: Report) -> Table:
    table = Table(title=f"{report.experiment}: methods at their best learning rate")
    table.add_column("method")
    table.add_column("runs", justify="right")
    names = [name for name in SCORES if any(name in line.metrics for line in report.lines)]
    for name in names:
        table.add_column(SCORES[name], justify="right")
    for line in report.lines:
        runs = max((each.count for each in line.metrics.values()), default=0)
        table.add_row(line.method, str(runs), *(_cell(line, name) for name in names))
    return table


def _cell(line: Line, name: str) -> str:
    if name not in line.metrics:
        return "-"
    found = line.metrics[name]
    mark = "*" if name in line.differences and line.differences[name].beyond_noise else ""
    around = "" if found.deviation is None else f" ±{found.deviation:.3f}"
    return f"{found.mean:.3f}{around}{mark}"


def _costs(report: Report) -> Table:
    table = Table(title="costs, means")
    table.add_column("method")
    for shown, _ in COSTS.values():
        table.add_column(shown, justify="right")
    for line in report.lines:
        cells = [
            f"{line.metrics[name].mean / unit:,.1f}" if name in line.metrics else "-"
            for name, (_, unit) in COSTS.items()
        ]
        table.add_row(line.method, *cells)
    return table


def _share_table(report: Report) -> Table:
    table = Table(title=f"score as a share of {report.against}'s: mean over tasks and seeds, 95 % bootstrap interval")
    for name in ("method", "share", "share above the majority class"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for line in report.lines:
        table.add_row(line.method, *(_share(line.shares.get(name)) for name in ("plain", "above chance")))
    return table


def _share(found: Share | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:.3f} (1 run)"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def _rates(report: Report) -> list[str]:
    return [
        f"{line.method} learns best at {line.rate:g}: "
        + ", ".join(f"{rate:g} LA {score:.3f}" for rate, score in sorted(line.tried.items()))
        for line in report.lines
        if len(line.tried) > 1
    ]


def _unmatched(report: Report) -> list[str]:
    name = "continual/learning_accuracy"
    reference = next(line for line in report.lines if line.method == report.against)
    notes = []
    for line in report.lines:
        if name not in line.metrics or name not in reference.metrics:
            continue
        gap = line.metrics[name].mean - reference.metrics[name].mean
        if abs(gap) > MATCHED:
            which = "more" if gap > 0 else "less"
            notes.append(
                f"{line.method} learns {which} than {report.against}: learning accuracy differs by {gap:+.3f}, so what "
                "they forget is not compared at equal learning"
            )
    return notes
