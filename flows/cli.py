"""The command `neft`: run a stream, report what was forgotten, look into the registry and into the model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.environment import silence_telemetry
from neft.errors import FailedError, InputError, NeftError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flows.comparison import Comparison
    from flows.inspection import Inspection
    from registry import Registry, Run

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True, help=__doc__)
registry_app = typer.Typer(no_args_is_help=True, help="Look up, and check out, what has been learnt.")
app.add_typer(registry_app, name="registry")
inspect_app = typer.Typer(no_args_is_help=True)
app.add_typer(inspect_app, name="inspect")

# A file or a pipe has no width, and a table should not be cut for it.
_OUT = Console(width=None if sys.stdout.isatty() else 160)
_debug = False


def _set_debug(value: bool) -> None:
    global _debug  # noqa: PLW0603 - read once, by `main`, after the command has failed
    _debug = _debug or value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.", callback=_set_debug)
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: training.max_steps=20.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BaseModel = Annotated[
    str | None, typer.Option(help="Name or fingerprint of the base model, if the task was learnt on several.")
]
Location = Annotated[
    Path | None, typer.Option("--registry", help="Folder of the registry; default: the one in neft's home.")
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
    location = parsed.registry.location
    with _registry(location) as registry:
        found = registry.run(run_id)
    _OUT.print(reports.as_table([found]))
    _print_directions(found, location)


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
        if dry_run:
            _list_cells(comparison, json_)
        else:
            _learn_comparison(comparison, jobs, limit, debug)


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
        _print_json(inspections.as_json(found))
        return
    _OUT.print(inspections.as_table(found))
    _print_next_steps(config, found, plot)


@registry_app.command("list")
def list_entries(
    stream: Annotated[str | None, typer.Option(help="Only entries of this stream.")] = None,
    task: Annotated[str | None, typer.Option(help="Only versions of this task.")] = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """List the entries, newest last.

    Example: neft registry list --stream demo
    """
    with _registry(location) as registry:
        entries = registry.list(stream, task)
    if json_:
        _print_json([entry.to_dict() for entry in entries])
        return
    table = Table("entry", "stream", "built on", "neurons", "parameters", "score", "learnt at")
    for entry in entries:
        score = entry.metrics.get("scores", {}).get(entry.task)
        table.add_row(
            entry.reference,
            entry.stream,
            entry.parent or "the base model",
            f"{entry.neuron_count:,}",
            f"{entry.parameter_count:,}",
            "-" if score is None else f"{score:.3f}",
            f"{entry.created_at:%Y-%m-%d %H:%M}",
        )
    _OUT.print(table)


@registry_app.command()
def show(
    task: Annotated[str, typer.Argument(help="A task, or a version of it: TASK@2.", show_default=False)],
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Show one entry: its neurons, what it was learnt from and how, and its metrics.

    Example: neft registry show bbc-topic
    """
    with _registry(location) as registry:
        entry = registry.get(task, base_model=base_model)
        neurons = registry.neurons(entry)
    sites = {name: len(indices) for name, indices in neurons.indices.items()}
    described = entry.to_dict()
    if json_:
        _print_json(described | {"sites": sites})
        return
    # The ledger stands beside the sites.
    capacity = entry.metrics.get("capacity", {})
    described["metrics"] = {name: value for name, value in entry.metrics.items() if name != "capacity"}
    table = Table("field", "value", title=entry.reference)
    for name, value in described.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value, indent=1))
    table.add_row("sites", _sites_table(sites, capacity))
    _OUT.print(table)


@registry_app.command()
def checkout(
    task: Annotated[str, typer.Argument(help="A task, or a version of it: TASK@2.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder to write the model to; must not exist.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Write the model as it stood after a task, bit for bit, to a folder that transformers loads.

    Example: neft registry checkout bbc-topic --to models/after-bbc
    """
    if to.exists():
        raise InputError(f"--to {to} exists already; name a new folder")
    from neft.files import written_folder

    with _registry(location) as registry:
        entry = registry.get(task, base_model=base_model)
        model, tokenizer = registry.checkout(entry, base=base)
        with written_folder(to) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    if json_:
        _print_json({"entry": entry.reference, "folder": str(to), "state_digest": entry.state_digest})
        return
    _OUT.print(f"{entry.reference}: the model after it is in {to}, bit for bit (state {entry.state_digest[:12]})")


def _stop(signum: int, frame: object) -> None:
    """Ctrl-C ends Prefect's ephemeral server too, and reporting to it would wait for minutes: leave at once, as a kill
    would. A stream goes on from there all the same."""
    _complain("stopped; run the same command again to go on")
    if "PREFECT_API_URL" in os.environ:
        raise KeyboardInterrupt
    os._exit(130)


def _registry(location: Path | None) -> closing[Registry]:
    from flows.home import Home
    from registry import Registry

    folder = location or Home.find().registry
    if not (folder / "registry.db").exists():
        raise InputError(f"there is no registry in {folder}; run a stream first, or name its folder with --registry")
    return closing(Registry.open(folder))


def _list_cells(comparison: Comparison, as_json: bool) -> None:
    from flows.tuning import states

    found = states(comparison)
    if as_json:
        _print_json([{"run": name, "state": state} for name, state in found])
        return
    table = Table("run", "state", title=f"{comparison.name}: {len(found)} runs")
    for name, state in found:
        table.add_row(name, state)
    _OUT.print(table)


def _learn_comparison(comparison: Comparison, jobs: int, limit: float | None, debug: bool) -> None:
    """
    Raises:
        FailedError: a sentence for each run that failed.
    """
    from flows.launch import run_comparison

    signal.signal(signal.SIGINT, _stop)
    outcome = run_comparison(comparison, jobs, limit, debug)
    left = f", {len(outcome.left)} left for another time" if outcome.left else ""
    lines = [
        f"{comparison.name}: {len(outcome.learnt)} runs learnt, {len(outcome.known)} learnt before{left}",
        f"  {_folder()}neft compare --report {comparison.experiment}",
    ]
    _OUT.print("\n".join(lines), highlight=False, markup=False)
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
        _print_json(reports.as_json(found, results))
        return
    _OUT.print(reports.as_table(found))
    if plot is not None:
        _OUT.print(f"pictures are in {plot}", highlight=False, markup=False)


def _print_report(streams: list[str], location: Path | None, as_json: bool) -> None:
    from flows import report as reports

    with _registry(location) as registry:
        runs = [registry.newest_run(stream) for stream in streams]
    if as_json:
        described = [reports.as_json(run) for run in runs]
        _print_json(described[0] if len(described) == 1 else described)
    else:
        _OUT.print(reports.as_table(runs))


def _draw(stream: str, location: Path | None, path: Path) -> None:
    from flows.figures import heatmap
    from flows.report import matrix_of

    _check_picture(path)
    with _registry(location) as registry:
        matrix = matrix_of(registry.newest_run(stream))
    _save_picture(heatmap(matrix, f"R matrix of {stream}"), path)


def _check_picture(path: Path) -> None:
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path} ends in {path.suffix!r}; name a .png or .svg file")


def _save_picture(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _sites_table(sites: Mapping[str, int], capacity: Mapping[str, Sequence[int]]) -> Table:
    """Each site's neurons in an entry's set, and how many were free there before and after it was learnt."""
    table = Table("site", "neurons", "free before", "free after")
    for name in capacity or sites:
        table.add_row(name, f"{sites.get(name, 0):,}", *(f"{count:,}" for count in capacity.get(name, ())))
    return table


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
    _OUT.print("\n".join(lines), highlight=False, markup=False)


def _print_directions(run: Run, location: Path | None) -> None:
    """Where to look next."""
    tracking = dict(run.tracking or {})
    uri = tracking.get("uri", "")
    view = f"/#/experiments/{tracking.get('experiment_id', '')}/runs?compareRunsMode=CHART"
    where = f" --registry {location}" if location else ""
    folder = _folder()
    lines = ["", "Look further:", f"  {folder}neft report {run.stream} --json{where}"]
    if entries := tracking.get("entries"):
        entry = entries[-1]
        lines += [f"  {folder}neft registry list{where}"]
        lines += [f"  {folder}neft registry checkout {entry} --to models/{entry.replace('@', '-')}{where}"]
    if uri.startswith(("http://", "https://")):
        lines += [f"  {uri.rstrip('/')}{view}"]
    else:
        lines += [f"  {folder}mlflow ui --backend-store-uri {uri}", f"    then open http://127.0.0.1:5000{view}"]
    _OUT.print("\n".join(lines), highlight=False, markup=False)


def _folder() -> str:
    """What commands to copy begin with: `make` does not put the virtual environment on the path."""
    return "" if shutil.which("neft") else f"{Path(sys.argv[0]).parent}/"


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Run the command line; a mistake or a failure is one sentence on standard error, exit code 2 or 1."""
    silence_telemetry()
    try:
        app()
    except NeftError as error:
        if _debug:
            raise
        _complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if _debug:
            raise
        _complain(f"{error}; free some space or mend what it names, and run the same command again to go on")
        sys.exit(1)
    except Exception as error:
        # The last place to say it in; --debug shows where it came from.
        if _debug:
            raise
        reason = " ".join(str(error).split())[:300]
        _complain(f"unexpected {type(error).__name__}: {reason}; run again with --debug to see where, and report it")
        sys.exit(1)


def _complain(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"neft: {sentence}", markup=False)
