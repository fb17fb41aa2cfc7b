"""docs/benchmarks.md, made from the results on disk: `python -m benchmarks.page`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"

_HEAD = """# Benchmarks

Made by `python -m benchmarks.page` from the files in `benchmarks/results/`, which the commands below wrote; do not edit
it by hand. Ratios are taken round by round between steps that ran one after another in one process, and given as the
median, with the quartiles in brackets. A figure that no file holds says *not yet measured*.
"""

Result = dict[str, Any]

#: Shape -> where it is to be measured, and by which command.
_TRAININGS = {
    "training-smollm2-135m-cpu": "python -m benchmarks.training",
    "training-llama-3.2-1b-cuda": "python -m benchmarks.training --shape llama-3.2-1b",
    "training-llama-3.1-8b-cuda": "python -m benchmarks.training --shape llama-3.1-8b --batch 4",
}
_SERVINGS = {"serving-cpu": "python -m benchmarks.serving", "serving-cuda": "python -m benchmarks.serving"}


def page() -> str:
    """The whole page, as Markdown."""
    parts = [_HEAD, *_bars(), "## A training step\n", _TRAINING_TEXT]
    for name, command in _TRAININGS.items():
        parts += _training(name, command)
    parts += _profile("profile-smollm2-135m-cpu", "python -m benchmarks.profile")
    parts += ["## An overlay in use\n", _SERVING_TEXT]
    for name, command in _SERVINGS.items():
        parts += _serving(name, command)
    study = _read("selection")
    parts += ["## Choosing neurons\n", *(_selection(study) if study else [_missing("python -m benchmarks.selection")])]
    record = _read("registry")
    parts += ["## The registry\n", *(_registry(record) if record else [_missing("python -m benchmarks.registry")])]
    return "\n".join(parts) + "\n"


_TRAINING_TEXT = """One random model of the shape is trained by every method in turn, step by step on the same batches:
forward, backward, clipping of the gradient norm, and fused AdamW with float32 states. The loss is taken on the last
tokens of each example (its completion), and the head runs there alone, for every method. The chosen neurons are a
random tenth of the feed-forward neurons; `frozen` is the floor: forward, and backward to the inputs of the lowest layer
with chosen neurons, with nothing trained. `neft-upper` trains as many neurons, all of the upper half of the layers;
`neft-upper-cached` also keeps what enters them, and its time is that of the epochs after the first. Peak memory is that
of a fresh process with this method alone: on the CPU its whole resident set, Python and libraries included.
"""

_SERVING_TEXT = """Inference with an overlay in the base weight beside the base model, in turn, and the base model
beside itself (what noise alone makes of the ratio). Switching makes another overlay, held in memory, the active one.
"""


def _read(name: str) -> Result | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _missing(command: str) -> str:
    return f"*Not yet measured*: `{command}`, on a machine that has what it takes.\n"


def _ratio(figure: Result | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['median']:.3f} ({figure['low']:.3f}-{figure['high']:.3f})"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return [*lines, ""]


def _machine(result: Result) -> str:
    machine = result["machine"]
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"`{machine['command']}` on {where}; Python {machine['python']}, {versions}.\n"


def _training(name: str, command: str) -> Iterator[str]:
    result = _read(name)
    yield f"### {name.removeprefix('training-')}\n"
    if result is None:
        yield _missing(command)
        return
    yield (
        f"{result['model_parameters']:,} parameters in {result['layers']} layers, {result['dtype']}; batches of "
        f"{result['batch']} examples of {result['tokens']} tokens, {result['completion_tokens']} of them completion.\n"
    )
    full, lora = (result["methods"].get(each, {}).get("peak_memory_bytes") for each in ("full", "lora-matched"))
    rows = []
    for method, figures in result["methods"].items():
        peak = figures["peak_memory_bytes"]
        rows.append(
            [
                f"`{method}`",
                f"{figures['seconds']['median']:.3f}",
                f"{figures['tokens_a_second']:,.0f}",
                *(_ratio(figures[to]) for to in ("to_frozen", "to_lora_matched", "to_full")),
                _megabytes(peak),
                f"{peak / lora:.2f}" if lora else "-",
                f"{peak / full:.2f}" if full else "-",
                f"{figures['parameters']:,}",
                _megabytes(figures["optimiser_bytes"]),
                _megabytes(figures["checkpoint_bytes"]),
            ]
        )
    head = ["method", "s/step", "tokens/s", "time / frozen", "time / matched LoRA", "time / full", "peak MB"]
    head += ["memory / matched LoRA", "memory / full", "trained parameters", "optimiser MB", "checkpoint MB"]
    yield from _table(head, rows)
    yield _machine(result)


def _profile(name: str, command: str) -> Iterator[str]:
    result = _read(name)
    yield "### Where the time goes\n"
    if result is None:
        yield _missing(command)
        return
    yield (
        f"Milliseconds a step that each operator takes itself, {result['shape']}, the same batches, under PyTorch's "
        "profiler, which slows every step a little.\n"
    )
    rows = [
        [f"`{operator}`", *(f"{taken[method]:.0f}" for method in ("frozen", "neft"))]
        for operator, taken in [*result["milliseconds"].items(), ("all", result["total"])]
    ]
    yield from _table(["operator", "frozen", "neft"], rows)
    yield _machine(result)


def _serving(name: str, command: str) -> Iterator[str]:
    result = _read(name)
    yield f"### {name.removeprefix('serving-')}\n"
    if result is None:
        yield _missing(command)
        return
    inference, switching = result["inference"], result["switching"]
    rows = [
        [
            each,
            *(f"{inference[each][model]['median']:.3f}" for model in ("base", "overlay")),
            *(_ratio(inference[each][ratio]) for ratio in ("overlay_to_base", "base_to_itself")),
        ]
        for each in ("forward", "decode")
    ]
    yield (
        f"{inference['shape']}, {inference['dtype']}: a forward over 8 prompts of {inference['prompt']} tokens, and "
        f"{inference['new']} tokens decoded after one of them.\n"
    )
    yield from _table(["", "base, s", "overlay, s", "overlay / base", "base / itself"], rows)
    seconds = switching["seconds"]
    yield (
        f"Switching between two overlays of {_megabytes(switching['overlay_bytes'])} MB each "
        f"({switching['parameters']:,} parameters) in {switching['shape']}, {switching['dtype']}: "
        f"{seconds['median'] * 1e3:.0f} ms ({seconds['low'] * 1e3:.0f}-{seconds['high'] * 1e3:.0f}); afterwards the "
        f"base was {'' if switching['base_restored'] else '**not** '}restored bit for bit.\n"
    )
    yield _machine(result)


def _figures(study: Result, kind: str) -> dict[tuple[str, ...], Any]:
    """Key without its kind -> figure."""
    split = {tuple(key.split("/")): figure for key, figure in study["figures"].items()}
    return {key[1:]: figure for key, figure in split.items() if key[0] == kind}


def _spread(values: Sequence[float]) -> str:
    """Mean, range and number of values."""
    if not values:
        return "not yet measured"
    return f"{statistics.mean(values):.3f} ({min(values):.2f}-{max(values):.2f}, {len(values)})"


def _selection(study: Result) -> Iterator[str]:
    seeds = {key[2] for key in _figures(study, "score") if key[0] not in ("full", "untouched")}
    yield (
        f"SmolLM2-135M learns `{study['settings']['task']}` of the demo; scores are accuracies on "
        f"{study['evaluation_rows']} held-out rows (one row is {1 / study['evaluation_rows']:.3f}; always answering "
        f"the commonest label scores {study['majority']:.3f}), {len(seeds)} seeds: mean, range, and number of "
        "seeds measured. A seed decides which examples are scored and learnt from, and their order. With so few rows "
        "and seeds, differences of a few points say nothing.\n"
    )
    yield from _scores(study)
    yield from _places(study)
    yield "### What a score pass costs\n"
    yield from _costs(study)
    yield _machine(study)


def _scores(study: Result) -> Iterator[str]:
    scores = _figures(study, "score")
    budgets = sorted({key[1] for key in scores if key[0] not in ("full", "untouched")}, key=float)
    scorers = list(dict.fromkeys(key[0] for key in scores if key[0] not in ("full", "untouched")))

    def cell(scorer: str, budget: str) -> str:
        return _spread([figure["score"] for key, figure in scores.items() if key[:2] == (scorer, budget)])

    neurons, full = study["settings"]["neurons"], study["settings"]["full"]
    yield "### Held-out score by scorer and budget\n"
    yield (
        f"{neurons['max_steps']} steps of {neurons['per_device_train_batch_size']} examples, learning rate "
        f"{neurons['learning_rate']:g} for neurons, {full['learning_rate']:g} for full fine-tuning; "
        f"{study['settings']['examples']} examples scored.\n"
    )
    rows = [[f"`{scorer}`", *(cell(scorer, budget) for budget in budgets)] for scorer in scorers]
    yield from _table(["scorer", *(f"{float(budget):.0%}" for budget in budgets)], rows)
    yield f"Full fine-tuning: {cell('full', '1.0')}. The untouched model: {cell('untouched', '0.0')}.\n"


def _places(study: Result) -> Iterator[str]:
    places = _figures(study, "upper")
    yield "### All layers, or the upper half\n"
    yield "`taylor`, 10 % of the neurons, three epochs over the scored examples.\n"
    rows = [
        [name, _spread([figure["score"] for key, figure in places.items() if key[0] == name])]
        for name in dict.fromkeys(key[0] for key in places)
    ]
    yield from _table(["neurons of", "held-out score"], rows)


def _costs(study: Result) -> Iterator[str]:
    costs, memory = _figures(study, "cost"), _figures(study, "memory")
    training = memory[("training",)]["peak_memory_bytes"]
    rows = []
    for (scorer,), by_count in costs.items():
        for count, figures in by_count.items():
            read = count if len(by_count) > 1 or scorer == "similarity" else "-"
            rows.append(
                [
                    f"`{scorer}`",
                    read,
                    f"{figures['cpu_seconds']:.1f}",
                    f"{figures['to_task']:.1%}",
                    "-" if figures["overlap"] is None else f"{figures['overlap']:.2f}",
                    f"{memory[(scorer,)]['peak_memory_bytes'] / training:.2f}",
                ]
            )
    yield (
        "Processor time of one pass, on one thread, and as a share of a task of 500 steps; the overlap of the sets "
        "(10 %) that two samples with no example in common give; peak memory of a process that scores 48 examples, "
        "beside one that trains.\n"
    )
    head = ["scorer", "examples", "CPU s", "of a 500-step task", "overlap", "memory / training"]
    yield from _table(head, rows)


@dataclass(frozen=True)
class _Bar:
    """A figure that was to be reached: the most it may be, by result, and where it stands in one."""

    text: str
    limits: dict[str, float]
    figure: Callable[[Result], float]


_CPU, _ONE, _EIGHT = _TRAININGS
_EVERYWHERE = (_CPU, _ONE, _EIGHT)


def _time(method: str, to: str) -> Callable[[Result], float]:
    return lambda result: float(result["methods"][method][to]["median"])


def _memory(to: str) -> Callable[[Result], float]:
    def figure(result: Result) -> float:
        methods = result["methods"]
        return float(methods["neft"]["peak_memory_bytes"] / methods[to]["peak_memory_bytes"])

    return figure


def _used(*keys: str) -> Callable[[Result], float]:
    def figure(result: Result) -> float:
        value: Any = result
        for key in keys:
            value = value[key]
        return float(value)

    return figure


_BARS = (
    _Bar("step time / frozen floor", {_CPU: 1.05, _ONE: 1.10, _EIGHT: 1.10}, _time("neft", "to_frozen")),
    _Bar("step time / matched LoRA", {_CPU: 0.92, _ONE: 0.88, _EIGHT: 0.88}, _time("neft", "to_lora_matched")),
    _Bar("step time / full fine-tuning", dict.fromkeys(_EVERYWHERE, 0.75), _time("neft", "to_full")),
    _Bar(
        "step time / frozen floor, upper half of the layers, lower half cached",
        dict.fromkeys(_EVERYWHERE, 0.55),
        _time("neft-upper-cached", "to_frozen"),
    ),
    _Bar("peak memory / full fine-tuning", {_CPU: 0.5, _EIGHT: 0.35}, _memory("full")),
    _Bar("peak memory / matched LoRA", dict.fromkeys(_EVERYWHERE, 1.0), _memory("lora-matched")),
    _Bar(
        "forward with an overlay on / base (within the base's own noise)",
        dict.fromkeys(_SERVINGS, 1.0),
        _used("inference", "forward", "overlay_to_base", "median"),
    ),
    _Bar(
        "decoding with an overlay on / base (within the base's own noise)",
        dict.fromkeys(_SERVINGS, 1.0),
        _used("inference", "decode", "overlay_to_base", "median"),
    ),
    _Bar(
        "seconds to switch overlays, 1B shape", dict.fromkeys(_SERVINGS, 0.05), _used("switching", "seconds", "median")
    ),
)


#: What was set for the registry: figure, bar, unit, and where it stands in the file of a database.
_REGISTRY_BARS: tuple[tuple[str, str, Callable[[Result], str]], ...] = (
    ("look-up by task and alias, p50 / p99", "at most 3 / 10 ms", lambda found: _p50_p99(found["by_alias"])),
    ("owners of one neuron", "at most 50 ms", lambda found: _milliseconds(found["owners"])),
    ("ten nearest sets by IoU", "at most 300 ms", lambda found: _milliseconds(found["nearest"])),
    (
        "a plain NumPy loop / ten nearest sets",
        "at least 10",
        lambda found: f"{found['nearest_numpy_loop'] / found['nearest']['median']:.0f}",
    ),
    ("recording an entry, fsync included", "at most 250 ms", lambda found: _milliseconds(found["record"])),
    ("checkout of a chain / reading the model", "at most 2.0", lambda found: _ratio(found["checkout_to_reading"])),
    ("HTTP look-ups a second", "at least 500", lambda found: f"{found['lookups_a_second']:,.0f}"),
    ("database bytes an entry", "at most 100 kB", lambda found: f"{found['bytes_an_entry'] / 1e3:.1f} kB"),
    ("first look-up of owners, which reads every set", "-", lambda found: f"{found['owners_first_call']:.1f} s"),
    ("search by a metric and an alias", "-", lambda found: _milliseconds(found["search"])),
)


def _p50_p99(figure: Result) -> str:
    return f"{figure['p50'] * 1e3:.1f} / {figure['p99'] * 1e3:.1f} ms"


def _milliseconds(figure: Result) -> str:
    return f"{figure['median'] * 1e3:,.0f} ms ({figure['low'] * 1e3:,.0f}-{figure['high'] * 1e3:,.0f})"


def _registry(result: Result) -> Iterator[str]:
    """What the registry costs, on each database."""
    databases = result["databases"]
    first = next(iter(databases.values()))
    yield (
        f"{first['entries']:,} entries of a 7B model's shape, each of {first['neurons_a_set']:,} of "
        f"{first['neurons']:,} feed-forward neurons, made up in families that share most of their neurons. Recording "
        f"and checking out are of a 135M shape: overlays of {first['parameters']:,} parameters "
        f"({_megabytes(first['overlay_bytes'])} MB), a chain of {first['chain']}. Sets are compared in memory, where "
        "the first look-up of a process reads them. The plain loop intersects NumPy arrays one by one; it was run over "
        "a tenth of the sets and counted up.\n"
    )
    rows = [[text, bar, *(figure(found) for found in databases.values())] for text, bar, figure in _REGISTRY_BARS]
    yield from _table(["figure", "bar", *databases], rows)
    yield (
        "What stands in the way of the checkout: it compares every byte. The base's weights are hashed before the "
        "chain is laid on and after, and each overlay's file once, where loading the model hashes nothing and maps its "
        "file into memory. `checkout(verify=False)` leaves out the two digests of the weights.\n"
    )
    yield _machine(result)


_WHY = """What stands in the way on the CPU, where a figure is above its bar:

- *Step time over the floor*: the products that make the chosen rows' gradients, whose thin matrices run at a lower
  rate than dense ones; gathering the chosen columns of what flows through; writing the rows into the weights; the
  optimiser and clipping, which the floor has none of; and Python between the operators ("Where the time goes", below).
  One product for gate and up together would help, and so would a larger batch.
- *Upper half, cached*: the same, and the head, whose work the cache does not halve.
- *Peak memory*: the frozen model alone stands above the bar, since Python, the weights and this batch's activations are
  every method's. A smaller batch, or gradient checkpointing, moves the ratio; neft adds only its rows, their optimiser
  states and the inputs that their gradients need.
- *Decoding*: one more Python call for each layer and token. `merge_and_unload` takes the layers away, and the call.
- *Switching*: a chosen column of the down projection is spread over the whole weight, so that writing a tenth of them
  goes through all of its memory.
"""


def _bars() -> Iterator[str]:
    """The bars that were set, and what was measured."""
    rows = []
    for bar in _BARS:
        for name, limit in bar.limits.items():
            result = _read(name)
            measured = "not yet measured" if result is None else f"{bar.figure(result):.3f}"
            rows.append([bar.text, name.partition("-")[2], f"{limit:g}", measured])
    yield "## The bars\n"
    yield "What was set as the most that each figure may be, for a tenth of the feed-forward neurons and AdamW.\n"
    yield from _table(["figure", "measured on", "at most", "measured"], rows)
    yield _WHY


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
