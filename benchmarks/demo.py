"""The demo's page: `python -m benchmarks.demo` reads the reports of `make demo-compare` and writes docs/demo.md.

python -m benchmarks.demo record    # the newest runs -> benchmarks/results/demo.json and the picture
python -m benchmarks.demo page      # the recorded figures -> docs/demo.md
"""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from flows.figures import heatmap
from flows.home import Home
from flows.report import as_json, matrix_of
from flows.tracking import library_versions
from registry import Registry

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "images" / "demo-r-matrix.png"
PAGE = ROOT / "docs" / "demo.md"
STREAMS = ("demo", "demo-full")

_HEAD = """# The demo stream

Made by `python -m benchmarks.demo page` from `benchmarks/results/demo.json`, which `make demo-compare` and
`python -m benchmarks.demo record` wrote; do not edit it by hand. One seed, about a hundred evaluation examples a task:
differences of a few points between methods are within the noise, and each method's learning rate decides much. It shows
that the road works; it is no comparison of methods.

SmolLM2-135M-Instruct learns four tasks one after another. `demo` trains, for each task, a tenth of the feed-forward
neurons, chosen by the `taylor` scorer among those that no earlier task owns. `demo-full` trains every weight (plain
sequential fine-tuning, at a learning rate of its own). Neither keeps data of earlier tasks, nor is told which task an
example belongs to.
"""


def record() -> None:
    """Keep the newest finished run of each of the demo's streams."""
    with closing(Registry.open(Home.find().registry)) as registry:
        runs = [registry.newest_run(stream) for stream in STREAMS if stream in registry.streams()]
    unfinished = [run.stream for run in runs if run.status != "finished"]
    if unfinished or not runs:
        sys.exit(f"benchmarks.demo: run `make demo-compare` first; not finished: {', '.join(unfinished) or 'all'}")
    kept = {
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "versions": library_versions()},
        "command": "make demo-compare",
        "runs": [_kept(run) for run in runs],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    heatmap(matrix_of(runs[0]), "R matrix of the demo stream").savefig(PICTURE, dpi=110)


def _kept(run: Any) -> dict[str, Any]:
    """A run's report without what belongs to one machine's store."""
    described = as_json(run)
    left_out = ("tracking", "mlflow_run_id", "run", "error", "started_at", "finished_at")
    return {key: value for key, value in described.items() if key not in left_out}


def page() -> str:
    """The page, as Markdown, from the recorded figures."""
    kept = json.loads(RESULTS.read_text())
    parts = [_HEAD, "![R matrix](images/demo-r-matrix.png)", ""]
    for run in kept["runs"]:
        parts += _matrix(run)
    parts += _metrics(kept["runs"])
    machine = kept["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts += ["", f"Measured on {machine['cores']} cores, {machine['platform']}; {versions}."]
    return "\n".join(parts) + "\n"


def _matrix(run: dict[str, Any]) -> list[str]:
    lines = [f"## `{run['stream']}`: accuracy on each task after each task", ""]
    lines += ["| after | " + " | ".join(run["tasks"]) + " |", "|---|" + "---|" * len(run["tasks"])]
    for learnt, row in enumerate(run["matrix"]):
        name = run["tasks"][learnt - 1] if learnt else "(untouched)"
        cells = [f"**{score:.3f}**" if learnt == place + 1 else f"{score:.3f}" for place, score in enumerate(row)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _metrics(runs: list[dict[str, Any]]) -> list[str]:
    lines = ["## Metrics", "", "| metric | " + " | ".join(f"`{run['stream']}`" for run in runs) + " | formula |"]
    lines.append("|---|" + "---|" * len(runs) + "---|")
    # The formulas as they were when the runs were recorded.
    for name, formula in runs[0]["formulas"].items():
        values = [run["metrics"].get(name) for run in runs]
        if any(value is not None for value in values):
            shown = " | ".join("-" if value is None else f"{value:+.3f}" for value in values)
            lines.append(f"| {name} | {shown} | `{formula}` |")
    return lines


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record"]:
            record()
        case ["page"]:
            PAGE.write_text(page())
        case _:
            sys.exit(__doc__)
