"""Keystones inspected: how many a config's model has, where, what its capabilities share, and what silencing costs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flows.config import StreamConfig
from flows.progress import say
from neft.audit import base_fingerprint
from neft.errors import InputError
from neft.evaluation import Probe, evaluate, load_probes, perplexity
from neft.keystone import Keystones, KeystoneSearch, silenced
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection import POLICIES
from neft.scoring import SCORERS
from neft.strategies import build
from neft.tasks import Task, load_task

#: Which neurons are silenced.
Which = Literal["none", "keystone", "random"]


@dataclass(frozen=True)
class Ablated:
    """What the model is worth with `count` of its neurons silenced: none, the strongest keystones, or random ones.

    Args:
        perplexity: general probe -> perplexity.
        scores: task -> score in [0, 1] on its evaluation rows.
    """

    count: int
    which: Which
    perplexity: Mapping[str, float]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Inspection:
    """The keystones of a config's base model, and rows of their ablation, the first with none silenced."""

    stream: str
    base_model: str
    search: KeystoneSearch
    keystones: Keystones
    examples: Mapping[str, int]
    seed: int
    ablation: tuple[Ablated, ...]


def search_of(
    config: StreamConfig, prompts: Path | None = None, rho: float | None = None, new_tokens: int | None = None
) -> KeystoneSearch:
    """How the config's protection policy looks for keystones, or else its scorer, with what is given here on top.

    Raises:
        InputError: an option is out of range, or the prompts cannot be used.
    """
    chosen = (
        build("protection policy", POLICIES, config.method.protection),
        build("scorer", SCORERS, config.method.scorer),
    )
    found = next((each for each in chosen if isinstance(each, KeystoneSearch)), KeystoneSearch())
    return KeystoneSearch(
        prompts=found.prompts if prompts is None else prompts,
        rho=found.rho if rho is None else rho,
        new_tokens=found.new_tokens if new_tokens is None else new_tokens,
    )


def inspect_keystones(
    config: StreamConfig, search: KeystoneSearch, counts: Sequence[int] | None = None, examples: int = 16
) -> Inspection:
    """Find the keystones of the config's base model, and measure it with more and more of them silenced.

    Args:
        counts: how many to silence; default: 1, 4, 16, ... and all of them.
        examples: evaluation rows of each task, drawn by the config's seed.

    Raises:
        InputError: data, model or prompts cannot be used, or a count is larger than the number of keystones.
    """
    tasks = [_fewer(load_task(spec, config.seed), examples, config.seed) for spec in config.tasks]
    probes = load_probes(config.evaluation)
    model, tokenizer = load_base(config.model.name, config.model.dtype)
    config.check_lengths(getattr(model.config, "max_position_embeddings", None))
    nn.Module.to(model, torch.accelerator.current_accelerator() or torch.device("cpu"))
    space = NeuronSpace.from_model(model, config.method.kinds, config.model.neurons)
    say(f"looking for keystones among {len(space):,} neurons by {_prompts(search)}")
    found = search.find(model, tokenizer, space)
    say(f"found {len(found.neurons):,}")
    counts = _checked(counts, len(found.neurons))
    bench = _Bench(config, model, tokenizer, tasks, probes)
    return Inspection(
        stream=config.stream,
        base_model=base_fingerprint(model),
        search=search,
        keystones=found,
        examples={task.name: len(task.eval) for task in tasks},
        seed=config.seed,
        ablation=tuple(_ablation(bench, found, counts, config.seed)),
    )


def _fewer(task: Task, count: int, seed: int) -> Task:
    """The task with `count` of its evaluation rows, drawn by the seed since a file may be sorted by label."""
    if count >= len(task.eval):
        return task
    chosen = sorted(random.Random(seed).sample(range(len(task.eval)), count))
    return replace(task, eval=tuple(task.eval[number] for number in chosen))


def _prompts(search: KeystoneSearch) -> str:
    count = sum(len(prompts) for prompts in search.capabilities.values())
    return f"{count} prompts of {len(search.capabilities)} capabilities"


def _checked(counts: Sequence[int] | None, whole: int) -> list[int]:
    if counts is None:
        powers = [4**power for power in range(20)]
        return [count for count in powers if count < whole] + [whole] * (whole > 0)
    if max(counts, default=0) > whole:
        raise InputError(f"--top {max(counts)}: there are {whole} keystones; ask for fewer, or raise --rho")
    return sorted(set(counts) - {0})


@dataclass(frozen=True)
class _Bench:
    """The model under test, and what it is tested on."""

    config: StreamConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[Task]
    probes: Sequence[Probe]

    def measure(self, neurons: NeuronSet, which: Which) -> Ablated:
        """Perplexities and scores with `neurons` silenced."""
        spec = self.config.evaluation_spec
        with silenced(self.model, neurons):
            row = Ablated(
                len(neurons),
                which,
                {probe.name: perplexity(self.model, self.tokenizer, probe) for probe in self.probes},
                {task.name: evaluate(self.model, self.tokenizer, task, spec).value for task in self.tasks},
            )
        values = [f"{name} {value:.1f}" for name, value in row.perplexity.items()]
        values += [f"{name} {value:.3f}" for name, value in row.scores.items()]
        say(f"{f'{row.count} {which} neurons silenced' if neurons else 'untouched model'}: {', '.join(values)}")
        return row


def _ablation(bench: _Bench, found: Keystones, counts: Sequence[int], seed: int) -> Iterator[Ablated]:
    yield bench.measure(found.space.none(), "none")
    for count in counts:
        yield bench.measure(found.top(count), "keystone")
        yield bench.measure(random_neurons(found.space, count, seed), "random")


def random_neurons(space: NeuronSpace, count: int, seed: int) -> NeuronSet:
    """`count` neurons drawn evenly from the whole space; of one seed, a larger draw holds every smaller one."""
    order = torch.randperm(len(space), generator=torch.Generator().manual_seed(seed))[:count]
    chosen, first = {}, 0
    for site in space.sites:
        inside = order[(order >= first) & (order < first + site.size)]
        chosen[site.name] = inside - first
        first += site.size
    return NeuronSet(space, chosen)


# Shown


def as_json(inspection: Inspection) -> dict[str, Any]:
    """All that was found, without a path of this machine; a perplexity that is not finite is null."""
    from flows.tracking import library_versions

    found = inspection.keystones
    return {
        "stream": inspection.stream,
        "base_model": inspection.base_model,
        "prompts": {capability: list(prompts) for capability, prompts in inspection.search.capabilities.items()},
        "rho": inspection.search.rho,
        "new_tokens": inspection.search.new_tokens,
        "neurons": len(found.space),
        "keystones": len(found.neurons),
        "sites": {site.name: len(found.neurons[site.name]) for site in found.space.sites},
        "overlaps": [
            {"capabilities": list(pair), "intersection_over_union": value} for pair, value in found.overlaps().items()
        ],
        "ranking": [
            {"site": site, "neuron": index, "strength": float(found.strength[site][index])}
            for site, index in found.ranking
        ],
        "seed": inspection.seed,
        "examples": dict(inspection.examples),
        "ablation": [
            {
                "silenced": row.count,
                "which": row.which,
                "perplexity": {name: value if math.isfinite(value) else None for name, value in row.perplexity.items()},
                "scores": dict(row.scores),
            }
            for row in inspection.ablation
        ],
        "versions": library_versions(),
    }


def as_table(inspection: Inspection) -> RenderableType:
    """How many, where, what capabilities share, and the ablation."""
    found = inspection.keystones
    summary = (
        f"{len(found.neurons):,} of {len(found.space):,} neurons ({found.neurons.fraction:.2%}) are keystones of "
        f"{inspection.stream}'s base model: among the top {found.rho:.3g} of their site's neurons for each of "
        f"{', '.join(found.activity)}."
    )
    parts: list[RenderableType] = [Text(summary), Text(""), _sites_table(found), Text(""), _overlap_table(found)]
    if not found.neurons:
        return Group(*parts, Text("\nThere is nothing to silence: raise --rho, or name fewer capabilities."))
    return Group(*parts, Text(""), _ablation_table(inspection))


def _sites_table(found: Keystones) -> Table:
    table = Table("site", title="where")
    for name in ("keystones", "of"):
        table.add_column(name, justify="right")
    table.add_column("strongest (neuron: strength)")
    for site in found.space.sites:
        strongest = [(index, found.strength[site.name][index]) for name, index in found.ranking if name == site.name]
        shown = ", ".join(f"{index}: {strength:.1f}" for index, strength in strongest[:3])
        table.add_row(site.name, str(len(found.neurons[site.name])), f"{site.size:,}", shown)
    return table


def _overlap_table(found: Keystones) -> Table:
    table = Table(title="overlap of the capabilities' strongest neurons: intersection over union")
    table.add_column("")
    for name in found.by_capability:
        table.add_column(name, justify="right")
    for row, first in found.by_capability.items():
        table.add_row(row, *(f"{first.iou(second):.2f}" for second in found.by_capability.values()))
    return table


def _ablation_table(inspection: Inspection) -> Table:
    rows = " and ".join(sorted({str(count) for count in inspection.examples.values()}, key=int))
    table = Table(
        title=f"the model with neurons silenced: perplexity of general text, score on {rows} rows of each task; "
        f"random neurons of seed {inspection.seed}"
    )
    first = inspection.ablation[0]
    for name in ("silenced", "neurons", *(f"perplexity of {name}" for name in first.perplexity), *first.scores):
        table.add_column(name, justify="left" if name == "neurons" else "right")
    for row in inspection.ablation:
        which = "the strongest keystones" if row.which == "keystone" else row.which
        perplexities = [f"{value:,.1f}" for value in row.perplexity.values()]
        table.add_row(str(row.count), which, *perplexities, *(f"{value:.3f}" for value in row.scores.values()))
    return table
