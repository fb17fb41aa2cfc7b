"""Which neurons to train: `python -m benchmarks.selection` compares the scorers on a real model and real data.

For each scorer, budget and seed: the held-out score after training the set that the scorer chose, beside random sets
and full fine-tuning. For each scorer: what a score pass costs beside a 500-step task, its peak memory beside that of
training, and how much the sets of two disjoint samples overlap. `make demo-data` prepares model and data. Every figure
is written as soon as it is measured: a run that was stopped goes on where it stood (`--again` starts anew), and
processes with different `--seeds` or `--budgets` share the work.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from filelock import FileLock
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from benchmarks.measure import RESULTS, ROOT, machine, peak_resident
from flows.config import load_config
from neft.encoding import batches
from neft.evaluation import EvaluationSpec, evaluate
from neft.models import load_base
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.scoring import SCORERS, Scores
from neft.selection import Budget, SelectionSpec, select
from neft.tasks import Example, Task, load_task
from neft.training import train
from neft.training_spec import TrainingSpec
from neft.tuner import NeftConfig, NeftModel

TASK = "bbc-topic"
BUDGETS = (0.1, 0.01, 0.3, 0.03)

#: Examples that a scorer reads, for the study; and for the question of how many a stable choice needs.
EXAMPLES = 48
SAMPLES = (24, 48)

#: Steps of the task whose time a score pass is compared with.
TASK_STEPS = 500

_BATCH, _LENGTH = 4, 128
_TENTH = Budget(neurons=0.1)
_NEURONS = TrainingSpec(max_steps=16, learning_rate=3e-4, max_length=_LENGTH, per_device_train_batch_size=_BATCH)
_FULL = _NEURONS.model_copy(update={"learning_rate": 2e-5})

#: For the upper half of the layers against all of them: few examples over several epochs, where caching pays.
_EPOCHS = _NEURONS.model_copy(update={"max_steps": None, "num_train_epochs": 3.0})
PLACES = {"all layers": (0, False), "upper half": (0.5, False), "upper half, cached": (0.5, True)}


#: Scorers that fine-tune the whole model, which come last.
_COSTLY = ("similarity",)

_PATH = RESULTS / "selection.json"
_SETTINGS = {
    "task": TASK,
    "examples": EXAMPLES,
    "neurons": _NEURONS.model_dump(),
    "full": _FULL.model_dump(),
    "epochs": _EPOCHS.model_dump(),
}


class Study:
    """Model and task; the figures are in the file."""

    def __init__(self) -> None:
        config = load_config(ROOT / "configs" / "demo.yaml")
        self.task = next(load_task(spec, config.seed) for spec in config.tasks if spec.name == TASK)
        model, self.tokenizer = load_base(config.model.name, "float32")
        self.model: PreTrainedModel = model
        self.space = NeuronSpace.from_model(model)
        self.described = {
            "machine": machine(torch.device("cpu")),
            "settings": _SETTINGS,
            "evaluation_rows": len(self.task.eval),
            "majority": self.task.majority,
        }

    def cost(self, scorer: str) -> None:
        """Processor time of a score pass, beside that of a training step; and the overlap of two samples' sets."""
        step = self._once("training", lambda: {"cpu_seconds_a_step": self._step_seconds()})["cpu_seconds_a_step"]
        self._once(f"cost/{scorer}", lambda: self._cost(scorer, step))
        self._once(f"memory/{scorer}", lambda: {"peak_memory_bytes": _memory_in_fresh_process(scorer)})
        self._once("memory/training", lambda: {"peak_memory_bytes": _memory_in_fresh_process("training")})

    def _cost(self, scorer: str, step: float) -> dict[str, Any]:
        measured = {}
        for count in _samples(scorer):
            first, second = (self.task.train[start : start + count] for start in (0, len(self.task.train) // 2))
            start = time.process_time()
            scores = self.scores(scorer, first, seed=0)
            seconds = time.process_time() - start
            measured[str(count)] = {"cpu_seconds": seconds, "to_task": seconds / (TASK_STEPS * step), "overlap": None}
            if SCORERS[scorer].needs_data and scorer not in _COSTLY:
                chosen, other = (select(each, _TENTH).neurons for each in (scores, self.scores(scorer, second, seed=1)))
                measured[str(count)]["overlap"] = len(chosen & other) / len(chosen)
        return measured

    def _step_seconds(self) -> float:
        """Median processor time of an optimiser step of neft's own, over a training run."""
        neurons = select(self.scores("random", (), seed=0), _TENTH).neurons
        times: list[float] = []
        spec = _NEURONS.model_copy(update={"max_steps": 8, "logging_steps": 1})
        self._learn(neurons, self.task, spec, 0, times)
        return statistics.median(later - earlier for earlier, later in pairwise(times[1:]))

    def scores(self, scorer: str, examples: Sequence[Example], seed: int) -> Scores:
        """A score pass over examples."""
        read = list(batches(self.tokenizer, examples, _BATCH, _LENGTH))
        return SCORERS[scorer]().score(self.model, self.tokenizer, self.space, read, seed)

    @cache  # noqa: B019 - one study lives as long as the process
    def sample_scores(self, scorer: str, seed: int) -> Scores:
        """The scores that a seed's sample gives, which the study takes every budget's set from."""
        return self.scores(scorer, self._sample(seed).train[:EXAMPLES], seed)

    def _learn(
        self, neurons: NeuronSet, task: Task, spec: TrainingSpec, seed: int, times: list[float] | None = None
    ) -> Overlay:
        peft_model = get_peft_model(self.model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
        tuner = cast(NeftModel, peft_model.base_model)
        try:
            train(
                peft_model,
                self.tokenizer,
                task,
                spec,
                seed,
                lambda *_: times.append(time.process_time()) if times is not None else None,
            )
            return tuner.overlay(neurons)
        finally:
            self.model = cast(PreTrainedModel, tuner.unload())

    def score_after(self, scorer: str, budget: float, seed: int) -> None:
        """The held-out score after training the chosen set; the model is then as it was."""
        self._once(f"score/{scorer}/{budget}/{seed}", lambda: self._score_after(scorer, budget, seed))

    def _score_after(self, scorer: str, budget: float, seed: int) -> dict[str, Any]:
        neurons = select(self.sample_scores(scorer, seed), Budget(neurons=budget)).neurons
        return self._after(neurons, self._sample(seed), _NEURONS, seed)

    def upper_after(self, place: str, seed: int) -> None:
        """The held-out score after several epochs over few examples, by where the neurons may be."""
        self._once(f"upper/{place}/{seed}", lambda: self._upper_after(place, seed))

    def _upper_after(self, place: str, seed: int) -> dict[str, Any]:
        lowest, cached = PLACES[place]
        task = self._sample(seed)
        task = replace(task, train=task.train[:EXAMPLES])
        neurons = select(self.sample_scores("taylor", seed), _TENTH, SelectionSpec(lowest_layer=lowest)).neurons
        return self._after(neurons, task, _EPOCHS.model_copy(update={"cache_frozen_layers": cached}), seed)

    def _after(self, neurons: NeuronSet, task: Task, spec: TrainingSpec, seed: int) -> dict[str, Any]:
        overlay = self._learn(neurons, task, spec, seed)
        before = overlay.lay_on(self.model)
        score = self._score()
        before.lay_on(self.model)
        return {"score": score, "neurons": len(neurons), "parameters": neurons.parameters}

    def full_after(self, seed: int) -> None:
        """The held-out score after full fine-tuning; the model is then as it was."""
        self._once(f"score/full/1.0/{seed}", lambda: self._full_after(seed))

    def _full_after(self, seed: int) -> dict[str, Any]:
        before = {name: values.clone() for name, values in self.model.state_dict().items()}
        train(self.model.requires_grad_(True), self.tokenizer, self._sample(seed), _FULL, seed)
        self.model.requires_grad_(False)
        score = self._score()
        self.model.load_state_dict(before)
        return {"score": score, "neurons": len(self.space), "parameters": self.space.model_parameters}

    def untouched(self) -> None:
        """The held-out score of the base model."""
        self._once("score/untouched/0.0/0", lambda: {"score": self._score(), "neurons": 0, "parameters": 0})

    def _sample(self, seed: int) -> Task:
        """The task with its training examples in an order of the seed's: other ones are scored, and learnt from."""
        order = list(self.task.train)
        random.Random(seed).shuffle(order)
        return replace(self.task, train=tuple(order))

    def _score(self) -> float:
        return evaluate(self.model, self.tokenizer, self.task, EvaluationSpec(max_length=_LENGTH)).value

    def _once(self, key: str, figure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A figure from the file, else measured and added to it."""
        figures = _kept()["figures"]
        if key not in figures:
            measured = figure()
            with FileLock(f"{_PATH}.lock"):
                figures = _kept()["figures"] | {key: measured}
                _PATH.write_text(json.dumps(self.described | {"figures": figures}, indent=1) + "\n")
        return cast(dict[str, Any], figures[key])


def _kept() -> dict[str, Any]:
    """The result on disk."""
    return cast(dict[str, Any], json.loads(_PATH.read_text())) if _PATH.is_file() else {"figures": {}}


def _samples(scorer: str) -> Sequence[int]:
    """How many examples to try; `similarity` goes round them for its steps, and others read none of the task's."""
    return SAMPLES if SCORERS[scorer].needs_data and scorer not in _COSTLY else (EXAMPLES,)


def _memory_in_fresh_process(what: str) -> int:
    command = [sys.executable, "-m", "benchmarks.selection", "--memory-of", what]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _report_memory(what: str) -> None:
    study = Study()
    if what == "training":
        neurons = select(study.scores("random", (), seed=0), _TENTH).neurons
        study._learn(neurons, study.task, _NEURONS.model_copy(update={"max_steps": 6}), 0)
    else:
        study.scores(what, study.task.train[:48], seed=0)
    print(peak_resident())


def measure(seeds: Sequence[int], budgets: Sequence[float], costs: bool) -> None:
    """The costs, if asked for, then the scores, seed by seed; what fine-tunes the whole model comes last of each."""
    study = Study()
    study.untouched()
    scorers = sorted(SCORERS, key=lambda name: name in _COSTLY)
    cells = [(scorer, budget, seed) for scorer in scorers for seed in seeds for budget in budgets]
    cells.sort(key=lambda cell: (cell[0] in _COSTLY, cell[2], budgets.index(cell[1])))
    places = [(place, seed) for seed in seeds for place in PLACES]
    bar = tqdm(total=len(SCORERS) * costs + len(cells) + len(places) + len(seeds), desc="selection", file=sys.stderr)
    for scorer in scorers if costs else ():
        study.cost(scorer)
        bar.update()
    for scorer, budget, seed in cells:
        study.score_after(scorer, budget, seed)
        bar.update()
    for seed in seeds:
        study.full_after(seed)
        bar.update()
    for place, seed in places:
        study.upper_after(place, seed)
        bar.update()
    bar.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", choices=BUDGETS, default=BUDGETS)
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--memory-of", choices=["training", *SCORERS], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not (ROOT / ".neft" / "demo").is_dir():
        sys.exit("benchmarks.selection: no model and data in .neft/demo; run `make demo-data` first")
    if arguments.memory_of:
        _report_memory(arguments.memory_of)
        return
    if arguments.again:
        _PATH.unlink(missing_ok=True)
    if _kept().get("settings", _SETTINGS) != _SETTINGS:
        sys.exit(f"benchmarks.selection: {_PATH} holds figures of other settings; start anew with --again")
    measure(arguments.seeds, arguments.budgets, 0 in arguments.seeds)


if __name__ == "__main__":
    main()
