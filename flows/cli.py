"""The command `neft`: run a stream, report what was forgotten, look into the registry and into the model."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows import registry_commands, registry_files, registry_serve  # noqa: F401 - each adds its commands to the group
from flows.environment import silence_telemetry
from flows.registries import ARTIFACTS, URL, Where
from flows.registry_options import (
    OUT,
    Debug,
    Json,
    Location,
    debugging,
    open_registry,
    print_json,
)
from neft.errors import FailedError, InputError, NeftError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flows.comparison import Comparison
    from flows.config import RegistrySpec
    from flows.inspection import Inspection
    from flows.known import Known
    from registry import Run

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True, help=__doc__)
app.add_typer(registry_commands.registry_app, name="registry")
inspect_app = typer.Typer(no_args_is_help=True)
app.add_typer(inspect_app, name="inspect")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: training.max_steps=20.")
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="The stream's YAML file.", show_default=False)],
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Learn a stream's tasks in order; started again, go on where it stopped.

    Example: neft run configs/demo.yaml --set training.max_steps=20
    """
    from flows import report as reports
    from flows.config import load_config
    from flows.launch import run_stream

    parsed = load_config(config, overrides or ())
    signal.signal(signal.SIGINT, _stop)
    run_id = run_stream(parsed, debug)
    with closing(Where.of(parsed.registry).open()) as registry:
        found = registry.run(run_id)
    OUT.print(reports.as_table([found]))
    _print_directions(found, parsed.registry)


@app.command()
def report(
    streams: Annotated[list[str], typer.Argument(help="Streams, by name.", show_default=False)],
    json_: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the first stream's R matrix to this PNG or SVG.")] = None,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Print the R matrix and the metrics of each stream's newest run.

    Example: neft report demo demo-full
    """
    _print_report(streams, location, json_)
    if plot is not None:
        _draw(streams[0], location, plot)


@app.command()
def compare(
    config: Annotated[Path | None, typer.Argument(help="The comparison's YAML file.", show_default=False)] = None,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once; each gets its share of the cores.")] = 1,
    limit: Annotated[
        float | None, typer.Option(metavar="MINUTES", min=0, help="Begin no new run after so many minutes.")
    ] = None,
    known: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Leave out what this file keeps: runs of other machines, as JSON."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs, and which are done.")] = False,
    report: Annotated[
        str | None, typer.Option(metavar="EXPERIMENT", help="Report on a comparison, from MLflow alone.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="Method to compare with; default: the first.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="Where MLflow is; default: MLFLOW_TRACKING_URI, or neft's home.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also draw the report's pictures.")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Compare methods on a stream over orders, seeds and learning rates; started again, go on where it stopped.

    Example: neft compare configs/forgetting-demo.yaml --jobs 2
    """
    if (config is None) == (report is None):
        raise InputError("give either the comparison's config to learn it, or --report EXPERIMENT to report on it")
    if report is not None:
        _report_comparison(report, against, tracking_uri, plot, json_)
    elif config is not None:
        from flows.comparison import load_comparison

        comparison = load_comparison(config, overrides or ())
        elsewhere = None
        if known is not None:
            from flows.known import Known

            elsewhere = Known.read(known, comparison.experiment)
        if dry_run:
            _list_cells(comparison, elsewhere, json_)
        else:
            _learn_comparison(comparison, elsewhere, jobs, limit, debug)


@inspect_app.callback()
def _inspect() -> None:
    """Look into a config's base model."""
    # Without a callback of its own, a group of one command would lose the command's name.


@inspect_app.command()
def keystone(
    config: Annotated[Path, typer.Argument(help="The stream's YAML file.", show_default=False)],
    overrides: Overrides = None,
    prompts: Annotated[
        Path | None, typer.Option(help="YAML file, capability -> prompts; default: the config's, or neft's own.")
    ] = None,
    rho: Annotated[
        float | None, typer.Option(help="Share of each site that counts as its strongest; default: the config's.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated after each prompt; default: the config's.")
    ] = None,
    top: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help="How many keystones to silence; default: 1, 4, 16, ... and all."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Evaluation rows of each task.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ablation to this PNG or SVG.")] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Find the neurons that every capability of a config's base model needs, and measure the model without them.

    Example: neft inspect keystone configs/demo.yaml --plot keystones.png
    """
    from flows import inspection as inspections
    from flows.config import load_config

    if plot is not None:
        _check_picture(plot)
    parsed = load_config(config, overrides or ())
    search = inspections.search_of(parsed, prompts=prompts, rho=rho, new_tokens=new_tokens)
    found = inspections.inspect_keystones(parsed, search, _counts(top), examples)
    if plot is not None:
        from flows.figures import ablation

        title = f"{parsed.stream}'s base model without its strongest keystones"
        _save_picture(ablation(found.ablation, title), plot)
    if json_:
        print_json(inspections.as_json(found))
        return
    OUT.print(inspections.as_table(found))
    _print_next_steps(config, found, plot)


def _stop(signum: int, frame: object) -> None:
    """Ctrl-C ends Prefect's ephemeral server too, and reporting to it would wait for minutes: leave at once, as a kill
    would. A stream goes on from there all the same."""
    _complain("stopped; run the same command again to go on")
    if "PREFECT_API_URL" in os.environ:
        raise KeyboardInterrupt
    os._exit(130)


def _list_cells(comparison: Comparison, known: Known | None, as_json: bool) -> None:
    from flows.tuning import states

    found = states(comparison, known)
    if as_json:
        print_json([{"run": name, "state": state} for name, state in found])
        return
    table = Table("run", "state", title=f"{comparison.name}: {len(found)} runs")
    for name, state in found:
        table.add_row(name, state)
    OUT.print(table)


def _learn_comparison(comparison: Comparison, known: Known | None, jobs: int, limit: float | None, debug: bool) -> None:
    """
    Raises:
        FailedError: a sentence for each run that failed.
    """
    from flows.launch import run_comparison

    signal.signal(signal.SIGINT, _stop)
    outcome = run_comparison(comparison, jobs, limit, debug, known)
    left = f", {len(outcome.left)} left for another time" if outcome.left else ""
    lines = [
        f"{comparison.name}: {len(outcome.learnt)} runs learnt, {len(outcome.known)} learnt before{left}",
        f"  {_folder()}neft compare --report {comparison.experiment}",
    ]
    OUT.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    if outcome.failed:
        raise FailedError("\n".join(f"{name} failed: {reason}" for name, reason in outcome.failed.items()))


def _report_comparison(experiment: str, against: str | None, uri: str | None, plot: Path | None, as_json: bool) -> None:
    from flows import comparison_report as reports
    from flows.environment import mlflow_store
    from flows.home import Home
    from flows.results import chosen, read_results

    results = read_results(experiment, mlflow_store(uri, Home.find()))
    found = reports.report_of(experiment, results, against)
    if plot is not None:
        from flows.figures import comparison

        for name, figure in comparison(chosen(results), results).items():
            _save_picture(figure, plot / f"{name}.svg")
    if as_json:
        print_json(reports.as_json(found, results))
        return
    OUT.print(reports.as_table(found))
    if plot is not None:
        OUT.print(f"pictures are in {plot}", highlight=False, markup=False)


def _print_report(streams: list[str], location: Path | None, as_json: bool) -> None:
    from flows import report as reports

    with open_registry(location) as registry:
        runs = [registry.newest_run(stream) for stream in streams]
    if as_json:
        described = [reports.as_json(run) for run in runs]
        print_json(described[0] if len(described) == 1 else described)
    else:
        OUT.print(reports.as_table(runs))


def _draw(stream: str, location: Path | None, path: Path) -> None:
    from flows.figures import heatmap
    from flows.report import matrix_of

    _check_picture(path)
    with open_registry(location) as registry:
        matrix = matrix_of(registry.newest_run(stream))
    _save_picture(heatmap(matrix, f"R matrix of {stream}"), path)


def _check_picture(path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path} ends in {path.suffix!r}; name a .png or .svg file")


def _save_picture(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _counts(top: str | None) -> list[int] | None:
    """The numbers of `--top 4,16,64`."""
    if top is None:
        return None
    words = [word.strip() for word in top.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise InputError(f"--top {top!r} is no list of numbers; write how many neurons to silence, such as 4,16,64")
    return [int(word) for word in words]


def _print_next_steps(config: Path, found: Inspection, plot: Path | None) -> None:
    folder = _folder()
    again = f"neft inspect keystone {config}"
    lines = ["", "Look further:", f"  {folder}{again} --json"]
    lines += [f"  {plot}: the ablation as a picture"] if plot else [f"  {folder}{again} --plot keystones.png"]
    if found.keystones.neurons:
        lines += [
            f"  {folder}neft run {config} --set stream={found.stream}-guarded --set method.protection=keystone",
            "    learns the stream's tasks without touching a keystone",
        ]
    OUT.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _print_directions(run: Run, place: RegistrySpec) -> None:
    """Where to look next."""
    tracking = dict(run.tracking or {})
    uri = tracking.get("uri", "")
    view = f"/#/experiments/{tracking.get('experiment_id', '')}/runs?compareRunsMode=CHART"
    where = f" --registry {place.location}" if place.location else ""
    folder = _folder()
    lines = ["", "Look further:"]
    if place.url is not None:
        from registry.database import split_password

        # The commands below look there too, and so does whoever has these in a shell.
        lines += [f"  export {URL}={split_password(place.url)[0]} {ARTIFACTS}={place.artifacts}"]
    lines += [f"  {folder}neft report {run.stream} --json{where}"]
    if entries := tracking.get("entries"):
        entry = entries[-1]
        lines += [f"  {folder}neft registry list{where}"]
        lines += [f"  {folder}neft registry checkout {entry} --to models/{entry.replace('@', '-')}{where}"]
    if uri.startswith(("http://", "https://")):
        lines += [f"  {uri.rstrip('/')}{view}"]
    else:
        lines += [f"  {folder}mlflow ui --backend-store-uri {uri}", f"    then open http://127.0.0.1:5000{view}"]
    OUT.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _folder() -> str:
    """What commands to copy begin with: `make` does not put the virtual environment on the path."""
    return "" if shutil.which("neft") else f"{Path(sys.argv[0]).parent}/"


def main() -> None:
    """Run the command line; a mistake or a failure is one sentence on standard error, exit code 2 or 1."""
    silence_telemetry()
    try:
        app()
    except NeftError as error:
        if debugging():
            raise
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if debugging():
            raise
        _complain(f"{error}; free some space or mend what it names, and run the same command again to go on")
        sys.exit(1)
    except Exception as error:
        # The last place to say it in; --debug shows where it came from.
        if debugging():
            raise
        reason = " ".join(str(error).split())[:300]
        _complain(f"unexpected {type(error).__name__}: {reason}; run again with --debug to see where, and report it")
        sys.exit(1)


def _complain(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"neft: {sentence}", markup=False)
