"""A registry to look at: two streams on a tiny random Llama of 12 layers, whose tasks overlap, with all that is noted.

The only score is one that a random model can have: how often it predicts, on random text, the token that the task's
teacher predicts, which is the same model with the task's rows moved further. It says nothing about any real task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from neft.audit import base_fingerprint, state_digest
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.scoring import Scores
from registry import Entry, NewEntry, Registry

STREAM = ("film-sentiment", "bbc-topic", "ticket-urgency", "tweet-sentiment", "question-type", "spam")
#: A task's name that would run as a script if it were put in a page as markup.
HOSTILE = "<img src=x onerror=document.title='owned'>"
_WORDS = 64


def _model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Exhibitor:
    """Records tasks on the tiny model, one upon another."""

    registry: Registry
    stream: str
    layers: int = 12
    chain: list[Entry] = field(default_factory=list)
    taught: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = _model(self.layers)
        self.space = NeuronSpace.from_model(self.model, ["ffn", "attention"])
        self.base = base_fingerprint(self.model)
        config = json.loads(self.model.config.to_json_string())
        self.registry.add_base_model(self.base, "tiny-random-llama", "float32", config, self.model.num_parameters())

    def scores(self, task: str) -> Scores:
        """Random, higher in some layers than in others, and lower where an earlier task owns the neuron."""
        generator = torch.Generator().manual_seed(sum(map(ord, task + self.stream)))
        peak = float(torch.rand(1, generator=generator)) * self.layers
        owned = [self.registry.neurons(entry) for entry in self.chain]
        kinds = len(self.space.sites) // self.layers
        values = {}
        for number, site in enumerate(self.space.sites):
            near = 1 / (1 + (number // kinds - peak) ** 2 / 8)
            common = torch.rand(site.size, generator=torch.Generator().manual_seed(number))
            found = (0.5 * common + torch.rand(site.size, generator=generator)) * (1 + 0.3 * near)
            for neurons in owned:
                found[neurons[site.name].tolist()] *= 0.85
            values[site.name] = found
        return Scores(self.space, values)

    def record(self, task: str, **fields: Any) -> Entry:
        """Learn a task, which means here that the rows of its neurons are shaken."""
        scores = self.scores(task)
        edge = torch.cat(list(scores.values.values())).quantile(0.9)
        neurons = NeuronSet(self.space, {site: (each > edge).nonzero()[:, 0] for site, each in scores.values.items()})
        before = Overlay.read(self.model, neurons)
        torch.manual_seed(len(self.chain))
        moves = {name: 0.04 * torch.randn_like(rows) for name, rows in before.values.items()}
        teacher, overlay = (
            replace(before, values={name: rows + far * moves[name] for name, rows in before.values.items()})
            for far in (1.3, 1.0)
        )
        teacher.lay_on(self.model)
        self.taught.append(self.predicted(len(self.chain)))
        overlay.lay_on(self.model)
        score = self.agreement(self.predicted(len(self.chain)), len(self.chain))
        entry = self.registry.record(
            NewEntry(
                task=task,
                stream=self.stream,
                base_model=self.base,
                parent=self.chain[-1] if self.chain else None,
                input_digest=f"{self.stream}-{task}",
                seed=0,
                data_fingerprint=f"{sum(map(ord, task)):064x}",
                method={"kinds": ["ffn", "attention"], "scorer": "random", "budget": 0.1, "protection": "none"},
                training={"max_steps": 0, "learning_rate": 0.03},
                neurons=neurons,
                overlay=overlay,
                scores=scores,
                state_digest=state_digest(self.model),
                metrics={"metric": "agreement", "scores": {task: score}, "training_steps": 0},
                audit={"identical": True},
                versions={"torch": torch.__version__.partition("+")[0]},
                mlflow_run_id=f"{len(self.chain) + 1:032x}",
                prefect_flow_run_id=f"00000000-0000-4000-8000-{len(self.chain) + 1:012x}",
                **fields,
            )
        )
        self.chain.append(entry)
        return entry

    @torch.inference_mode()
    def predicted(self, place: int) -> torch.Tensor:
        """The tokens that the model as it stands predicts on the text of the task at that place of the stream."""
        ids = torch.randint(_WORDS, (8, 24), generator=torch.Generator().manual_seed(place))
        return self.model(input_ids=ids).logits.argmax(-1)

    def agreement(self, predicted: torch.Tensor, place: int) -> float:
        """The share of tokens that the teacher of that task predicts too."""
        return round(float((predicted == self.taught[place]).float().mean()), 4)

    def learn(self, tasks: Sequence[str]) -> None:
        """Record all tasks and the run that learnt them, with its R matrix."""
        states = [[self.predicted(place) for place in range(len(tasks))]]
        for task in tasks:
            self.record(task)
            states.append([self.predicted(place) for place in range(len(tasks))])
        rows = [[self.agreement(found, place) for place, found in enumerate(state)] for state in states]
        run = self.registry.start_run(
            stream=self.stream,
            config_digest="0" * 64,
            config={},
            tasks=tasks,
            mlflow_run_id="f" * 32,
            tracking={"experiment_id": "7"},
        )
        matrix = {"tasks": list(tasks), "rows": rows, "examples": [192] * len(tasks)}
        self.registry.update_run(run.id, status="finished", matrix=matrix, metrics={})


def exhibit(registry: Registry) -> None:
    """Record all of it."""
    support = Exhibitor(registry, "support")
    support.learn(STREAM)
    reviews = Exhibitor(registry, "reviews")
    reviews.record("product-reviews", reused_from=support.chain[0])
    reviews.record("film-sentiment")
    again = Exhibitor(registry, "support-tuned")
    again.chain = support.chain[:2]
    for entry in again.chain:
        registry.overlay(entry).lay_on(again.model)
    again.taught = support.taught[:2]
    again.record("ticket-urgency")
    registry.set_alias("film-sentiment", "champion", 1)
    registry.set_alias("film-sentiment", "challenger", 2)
    registry.set_alias("bbc-topic", "champion", 1)
    registry.set_tag("film-sentiment@1", "stage", "production")
    registry.set_tag("ticket-urgency@1", "stage", "trial")
    registry.set_tag("spam", "owner", "mail team")


def opened(folder: Path) -> Registry:
    """The exhibit, in a folder."""
    registry = Registry.open(folder)
    exhibit(registry)
    return registry
