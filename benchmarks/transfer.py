"""What a related task saves a new one: `python -m benchmarks.transfer` learns pairs with and without transfer.

Earlier tasks are learnt, each in a stream of its own. Then the later task is learnt in two more, once from fresh
neurons (`transfer: none`) and once from what the registry proposes of the earlier ones and the probe takes
(`transfer: auto`), by `neft run`'s own road. The held-out loss of the first at its end is what both are to reach; the
steps that each needs, one over the other, are the ratio. Rows are held out of the training data, the same for both.

python -m flows.demo                  # prepares model and data in .neft/demo
python -m benchmarks.transfer         # goes on where it was stopped
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from benchmarks.measure import RESULTS, ROOT, machine
from flows.config import StreamConfig, config_of, read_mapping
from flows.home import Home
from flows.launch import run_stream
from registry import Entry, Registry

FILE = RESULTS / "transfer.json"

#: A step, and the loss on the held-out rows after it.
Curve = Sequence[tuple[int, float]]


#: What is learnt before.
EARLIER = ("film-sentiment", "bbc-topic", "tweet-sentiment")

#: Task -> whether one of the earlier ones asks nearly the same of other texts; the last asks another thing of tweets.
LATER = {"film-verdict": True, "tweet-unhappy": True, "business-or-politics": True, "tweet-question": False}

STEPS = 30

#: Held-out loss is read every so many steps, on a share of the rows; early stopping, which reads it, never stops here.
_WATCHED = {"early_stopping_patience": STEPS, "eval_steps": 2, "validation_fraction": 0.16}
_TRAINING = {"max_steps": STEPS, "bf16": True}
_LIMIT = {"train": 400, "eval": 16}


def stream(demo: Path, registry: Path, task: str, seed: int, source: str) -> StreamConfig:
    """The demo's stream of one task."""
    raw = read_mapping(ROOT / "configs" / "demo-ten.yaml", "stream")
    (described,) = (each for each in raw["tasks"] if each["name"] == task)
    files = {part: str(demo / task / f"{part}.jsonl") for part in ("train", "eval")}
    watched = {} if source == "earlier" else _WATCHED
    changes = {
        "stream": f"{task}-{source}",
        "model": raw["model"] | {"name": str(demo / "model")},
        "tasks": [described | {"data": {"files": files, "limit": _LIMIT}}],
        "method": raw["method"] | {"transfer": "auto" if source == "auto" else "none"},
        "training": raw["training"] | _TRAINING | watched,
        "evaluation": {"batch_size": 16},
        "tracking": {"experiment": "transfer"},
        "registry": {"location": str(registry)},
        "seed": seed,
    }
    return config_of(raw | changes, "benchmarks.transfer", ROOT)


def learn(config: StreamConfig) -> Entry:
    """The task's entry, learnt unless it was before."""
    run_id = run_stream(config)
    with closing(Registry.open(config.registry.location)) as registry:
        (reference,) = (registry.run(run_id).tracking or {})["entries"]
        return registry.get(reference)


def curve(entry: Entry) -> Curve:
    """Held-out loss as the task was trained, from MLflow."""
    history = MlflowClient(Home.find().mlflow_uri).get_metric_history(entry.mlflow_run_id or "", "train/eval_loss")
    return sorted((point.step, point.value) for point in history)


def reached(curve: Curve, loss: float) -> int | None:
    """The first step at which a held-out loss is at or below another one; None if none is."""
    return next((step for step, value in curve if value <= loss), None)


def compared(fresh: Curve, auto: Curve) -> dict[str, Any]:
    """Steps that both need to the fresh start's held-out loss at its end, and their ratio.

    The fresh start may come to that loss before its end; the ratio to all of its steps, which counts that in favour of
    the other, stands beside as `of_all_steps`.
    """
    loss = fresh[-1][1]
    steps = {"fresh": reached(fresh, loss), "auto": reached(auto, loss)}
    assert steps["fresh"] is not None
    ratio = None if steps["auto"] is None else steps["auto"] / steps["fresh"]
    of_all = None if steps["auto"] is None else steps["auto"] / fresh[-1][0]
    ratios = {"steps_ratio": ratio, "of_all_steps": of_all}
    return {"loss": loss, "steps": steps, **ratios, "fresh": fresh, "auto": auto}


def measure(demo: Path, task: str, seed: int) -> dict[str, Any]:
    """Learn a task both ways, and compare."""
    folder = Home.find().path / f"seed-{seed}"
    for each in EARLIER:
        learn(stream(demo, folder / "earlier", each, seed, "earlier"))
    # A registry each: what one of them learns is nothing that another may start from.
    plain = learn(stream(demo, folder / "fresh", task, seed, "fresh"))
    begun = learn(stream(demo, _copied(folder / "earlier", folder / task), task, seed, "auto"))
    found = begun.metrics["transfer"]
    described = {"task": task, "related": LATER[task], "seed": seed}
    decision = {name: found.get(name) for name in ("start", "source", "held_out_losses", "advantage", "noise")}
    return described | {"decision": decision} | compared(curve(plain), curve(begun))


def _copied(registry: Path, place: Path) -> Path:
    if not place.exists():
        half = place.with_suffix(".half")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(registry, half)
        half.rename(place)
    return place


def settings(seed: int) -> dict[str, Any]:
    """What decides the figures of a seed, besides the data."""
    config = stream(Path("/demo"), Path("/registry"), "film-verdict", seed, "auto").model_dump(mode="json")
    return {"earlier": EARLIER, "rows": _LIMIT} | {name: config[name] for name in ("method", "training")}


def collect(demo: Path, tasks: Sequence[str], seeds: Sequence[int], file: Path) -> None:
    """Measure what the file does not hold yet, and write each figure as soon as there is one."""
    for seed in seeds:
        for task in tasks:
            used = json.loads(json.dumps(settings(seed)))
            known = json.loads(file.read_text())["pairs"] if file.is_file() else []
            of_others = [each for each in known if (each["task"], each["seed"]) != (task, seed)]
            if any(each not in of_others and each["settings"] == used for each in known):
                continue
            pairs = [*of_others, measure(demo, task, seed) | {"settings": used}]
            file.write_text(json.dumps({"machine": machine(torch.device("cpu")), "pairs": pairs}, indent=1) + "\n")


def steps_ratio(document: Mapping[str, Any]) -> float | None:
    """Mean ratio of the pairs of related tasks; None where there are none, or one never reached the loss."""
    ratios = [each["steps_ratio"] for each in document["pairs"] if each["related"]]
    return statistics.mean(ratios) if ratios and None not in ratios else None


def main() -> None:
    """Measure, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path(".neft/demo"), help="what `python -m flows.demo` prepared")
    parser.add_argument("--home", type=Path, default=Path(".neft/transfer"), help="where the streams are recorded")
    parser.add_argument("--tasks", nargs="+", choices=LATER, default=list(LATER))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--file", type=Path, default=FILE, help="where the figures are written")
    options = parser.parse_args()
    os.environ["NEFT_HOME"] = str(options.home)
    collect(options.demo.resolve(), options.tasks, options.seeds, options.file)


if __name__ == "__main__":
    main()
