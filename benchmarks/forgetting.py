"""docs/forgetting.md, from comparisons in MLflow: `python -m benchmarks.forgetting EXPERIMENT...` reads them anew.

Runs that `benchmarks/results/forgetting.json` keeps and MLflow does not have stay in it, so that several machines share
a comparison: `neft compare --known benchmarks/results/forgetting.json` leaves out what the file keeps. Without
experiments the page is made of the file alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks import transfer
from benchmarks.measure import RESULTS, ROOT, machine
from flows.comparison_report import COSTS, SCORES, Line, Report, report_of
from flows.environment import mlflow_store
from flows.figures import comparison
from flows.home import Home
from flows.results import Result, chosen, kept_results, read_results, united

FILE = RESULTS / "forgetting.json"
PAGE = ROOT / "docs" / "forgetting.md"
IMAGES = ROOT / "docs" / "images"

AA, LA, BWT = "continual/average_accuracy", "continual/learning_accuracy", "continual/backward_transfer"

_HEAD = """# What is forgotten, by method

Made by `python -m benchmarks.forgetting` from `benchmarks/results/forgetting.json`, which the same command, with the
names of comparisons, reads from MLflow, on every machine its own runs; do not edit it by hand. Every method stands at
the learning rate that learnt best on the first order and seed: mean and sample standard deviation over orders and
seeds, and in brackets how many runs. A `*` marks a difference to the first method beyond noise (95 % t-interval, paired
by order and seed). Seconds are those of runs that shared their cores with other work, some of them for longer than
others: what a step costs is measured in [Benchmarks](benchmarks.md).
"""


def collect(experiments: Sequence[str], uri: str) -> dict[str, Any]:
    """Every run of the comparisons, with those that the file keeps of other machines, and all the machines."""
    kept, machines = {}, []
    if FILE.is_file():
        kept, machines = kept_results(FILE), json.loads(FILE.read_text())["machines"]
    comparisons = kept | {name: united(kept.get(name, ()), read_results(name, uri)) for name in experiments}
    here = machine(torch.device("cpu"))
    return {
        "comparisons": {name: [_described(result) for result in results] for name, results in comparisons.items()},
        "machines": [*(each for each in machines if each != here), here],
    }


def _described(result: Result) -> dict[str, Any]:
    """A run as the file has it: files are named from the project's folder, wherever that lies on a machine."""
    described = result.to_dict()
    params = {key: str(value).removeprefix(f"{ROOT}/") for key, value in described["params"].items()}
    return described | {"params": params}


def results_of(document: Mapping[str, Any]) -> dict[str, list[Result]]:
    """Comparison -> its runs."""
    return {name: [Result.from_dict(run) for run in runs] for name, runs in document["comparisons"].items()}


def page(document: Mapping[str, Any], folder: Path = RESULTS) -> str:
    """The whole page, as Markdown.

    Args:
        folder: where the files of the other benchmarks lie, which some bars are read from.
    """
    comparisons = results_of(document)
    files = {name: json.loads((folder / name).read_text()) for name in _FILES if (folder / name).is_file()}
    parts = [_HEAD, *_bars(comparisons, files)]
    for name, results in comparisons.items():
        parts += _section(name, results)
    for machine_ in document["machines"]:
        versions = ", ".join(f"{library} {number}" for library, number in machine_["versions"].items())
        parts.append(f"- `{machine_['command']}` on {machine_['processor']}, {machine_['cores']} cores; {versions}.")
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return [*lines, ""]


def _section(name: str, results: Sequence[Result]) -> Iterator[str]:
    report = report_of(name, results)
    yield f"## {name}\n"
    yield from _scores(report)
    yield from _costs(report)
    rates = [
        f"`{line.method}` {', '.join(f'{rate:g}: {score:.3f}' for rate, score in sorted(line.tried.items()))}"
        for line in report.lines
        if len(line.tried) > 1
    ]
    if rates:
        yield f"Learning accuracy by learning rate: {'; '.join(rates)}.\n"
    for picture in pictures(name, results):
        yield f"![{picture.removeprefix(f'{name}-')}](images/{picture}.svg)"
    yield ""


def _scores(report: Report) -> list[str]:
    names = [name for name in SCORES if any(name in line.metrics for line in report.lines)]
    rows = []
    for line in report.lines:
        runs = max(each.count for each in line.metrics.values())
        rows.append([f"`{line.method}` ({runs})", f"{line.rate:g}", *(_cell(line, name) for name in names)])
    return _table(["method", "learning rate", *(SCORES[name] for name in names)], rows)


def _cell(line: Line, name: str) -> str:
    if name not in line.metrics:
        return "-"
    found = line.metrics[name]
    around = "" if found.deviation is None else f" ± {found.deviation:.3f}"
    mark = "\\*" if name in line.differences and line.differences[name].beyond_noise else ""
    return f"{found.mean:.3f}{around}{mark}"


def _costs(report: Report) -> list[str]:
    rows = [
        [
            f"`{line.method}`",
            *(
                f"{line.metrics[name].mean / unit:,.1f}" if name in line.metrics else "-"
                for name, (_, unit) in COSTS.items()
            ),
        ]
        for line in report.lines
    ]
    return _table(["method", *(shown for shown, _ in COSTS.values())], rows)


def pictures(name: str, results: Sequence[Result]) -> dict[str, Any]:
    """File name, without its ending -> picture."""
    return {f"{name}-{title}": figure for title, figure in comparison(chosen(results), results).items()}


# The bars

Methods = Mapping[str, Sequence[Result]]


@dataclass(frozen=True)
class _Bar:
    """A figure that was to be reached: what it is of, how it is made, and the least or the most it may be.

    Attributes:
        of: of how many tasks the comparison is that it is made of; or the file of another benchmark.
        figure: from that comparison's methods, or that file; None where a run that it needs is missing.
    """

    text: str
    of: int | str
    figure: Callable[[Any], float | None]
    least: float | None = None
    most: float | None = None

    def reached(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def limit(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"


def _mean(methods: Methods, method: str, metric: str) -> float | None:
    values = [result.metrics[metric] for result in methods.get(method, ()) if metric in result.metrics]
    return statistics.mean(values) if values else None


def _of(metric: str, method: str = "neft") -> Callable[[Methods], float | None]:
    return lambda methods: _mean(methods, method, metric)


def _least(metric: str, method: str = "neft") -> Callable[[Methods], float | None]:
    """The value of all runs that is farthest from zero: for what has to hold exactly."""

    def figure(methods: Methods) -> float | None:
        values = [result.metrics[metric] for result in methods.get(method, ()) if metric in result.metrics]
        return max(values, key=abs) if values else None

    return figure


def _gap(metric: str, other: str, method: str = "neft", others: str | None = None) -> Callable[[Methods], float | None]:
    """Mean of the paired differences between two methods.

    Args:
        others: the other's metric, where it is another one.
    """

    def figure(methods: Methods) -> float | None:
        ours, theirs = (
            {
                (result.order, result.seed): result.metrics[name]
                for result in methods.get(who, ())
                if name in result.metrics
            }
            for who, name in ((method, metric), (other, others or metric))
        )
        gaps = [value - theirs[place] for place, value in ours.items() if place in theirs]
        return statistics.mean(gaps) if gaps else None

    return figure


def _ratio(top: Callable[[Methods], float | None], bottom: Callable[[Methods], float | None]) -> Callable[..., Any]:
    def figure(methods: Methods) -> float | None:
        above, below = top(methods), bottom(methods)
        return above / below if above is not None and below else None

    return figure


_FOUR, _TEN = 4, 10

_TRANSFER, _PROTECTION = transfer.FILE.name, "protection-smollm2-135m-cpu.json"


def _said_of_transfer(file: Mapping[str, Any]) -> str:
    ratios = ", ".join(
        f"`{each['task']}` {'never' if each['steps_ratio'] is None else format(each['steps_ratio'], '.2f')} "
        f"({each['decision']['start']}{'' if each['related'] else ', unrelated'})"
        for each in file["pairs"]
    )
    return (
        "Steps with transfer / without is the mean of the related pairs that `python -m benchmarks.transfer` measured: "
        f"steps to the held-out loss that a fresh start ends with, the probe's own not counted. {ratios}."
    )


def _said_of_protection(file: Mapping[str, Any]) -> str:
    ratio = file["ratio"]
    return (
        "Step time with functional / without is the median that `python -m benchmarks.protection` measured, of "
        f"{ratio['count']} rounds; quartiles {ratio['low']:.3f} and {ratio['high']:.3f}."
    )


#: File of another benchmark -> what the page says of where its figure comes from.
_FILES = {_TRANSFER: _said_of_transfer, _PROTECTION: _said_of_protection}

_BARS = (
    _Bar("backward transfer without stored data, four tasks", _FOUR, _of(BWT), least=-0.015),
    _Bar("its loss / sequential LoRA's", _FOUR, _ratio(_of(BWT), _of(BWT, "lora")), most=0.1),
    _Bar("learning accuracy - LoRA's best", _FOUR, _gap(LA, "lora"), least=-0.02),
    _Bar("backward transfer without stored data, ten tasks", _TEN, _of(BWT), least=-0.03),
    _Bar("backward transfer, routed", _FOUR, _of("routed/backward_transfer"), least=-0.01),
    _Bar("routing accuracy", _FOUR, _of("routed/accuracy"), least=0.97),
    _Bar("backward transfer, oracle, farthest from 0", _FOUR, _least("oracle/backward_transfer"), least=0.0, most=0.0),
    _Bar("routed average accuracy - single", _FOUR, _gap("routed/average_accuracy", "single", others=AA), least=-0.02),
    _Bar("average accuracy - olora", _FOUR, _gap(AA, "olora"), least=0.05),
    _Bar("average accuracy - osf", _FOUR, _gap(AA, "osf"), least=0.05),
    _Bar("average accuracy - replay", _FOUR, _gap(AA, "replay"), least=0.0),
    _Bar("average accuracy - joint", _FOUR, _gap(AA, "joint"), least=-0.03),
    _Bar("rise of general perplexity", _FOUR, _of("perplexity_rise"), most=0.02),
    _Bar("steps with transfer / without", _TRANSFER, transfer.steps_ratio, most=0.6),
    _Bar(
        "memory a task / its overlay",
        _FOUR,
        _ratio(_of("cost/memory_bytes_per_task"), _of("cost/overlay_bytes_per_task")),
        most=0.2,
    ),
    _Bar(
        "step time with functional / without",
        _PROTECTION,
        lambda file: file["ratio"]["median"],
        most=1.05,
    ),
)


def _bars(comparisons: Mapping[str, Sequence[Result]], files: Mapping[str, Any]) -> Iterator[str]:
    """The bars that were set, and what was measured: in the first comparison of as many tasks, or in a file."""
    rows = []
    for bar in _BARS:
        if isinstance(bar.of, str):
            value = bar.figure(files[bar.of]) if bar.of in files else None
        else:
            of_size = (chosen(runs) for runs in comparisons.values() if runs and len(runs[0].tasks) == bar.of)
            value = bar.figure(next(of_size, {}))
        measured = "-" if value is None else f"{value:.4f}"
        state = "not measured" if value is None else "reached" if bar.reached(value) else "missed"
        rows.append([bar.text, bar.limit, measured, state])
    yield "## The bars\n"
    yield "Of the method `neft`, means over orders and seeds; differences to another method are paired.\n"
    yield from _table(["figure", "bar", "measured", ""], rows)
    for name, file in files.items():
        yield f"{_FILES[name](file)}\n"


def write_page(document: Mapping[str, Any], page_file: Path = PAGE, images: Path = IMAGES) -> None:
    """Write the page and its pictures."""
    page_file.write_text(page(document), encoding="utf-8")
    # Without a date and with fixed ids, the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "neft"}):
        for name, results in results_of(document).items():
            for title, figure in pictures(name, results).items():
                figure.savefig(images / f"{title}.svg", metadata={"Date": None})


def main() -> None:
    """Read comparisons where some are named, and write the page where there is something to write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", help="comparisons, by their MLflow experiments")
    parser.add_argument("--tracking-uri", help="where MLflow is; default: MLFLOW_TRACKING_URI, or neft's home")
    options = parser.parse_args()
    if options.experiments:
        document = collect(options.experiments, mlflow_store(options.tracking_uri, Home.find()))
        FILE.write_text(json.dumps(document, indent=1) + "\n")
    if FILE.is_file():
        write_page(json.loads(FILE.read_text()))


if __name__ == "__main__":
    main()
