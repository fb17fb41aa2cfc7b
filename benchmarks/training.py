"""What a training step costs: `python -m benchmarks.training` times neft beside its peers and writes the figures.

python -m benchmarks.training                                   # SmolLM2-135M's shape, fp32, on the CPU
python -m benchmarks.training --shape llama-3.2-1b              # bf16, on a GPU
python -m benchmarks.training --shape llama-3.1-8b --batch 4    # bf16, on a GPU

All methods train one random model in one process, step by step in turn, on the same batches; each method's memory is
that of a fresh process. Needs torch, transformers and peft alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import ROOT, interleaved, machine, peak_resident, ratios, summary, write
from benchmarks.optimiser import AdamW
from benchmarks.peers import DENSE, METHODS, SHAPES, Learner, fresh_model, twin

#: Different batches that the steps go through in turn: an epoch.
BATCHES = 4

#: Tokens at the end of every example that the loss is taken on: its completion.
COMPLETION = 16

#: Above so many parameters, methods that train dense weights are timed one at a time beside the frozen model.
_LARGE = 2_000_000_000


class Training:
    """One method, training: `step(n)` is an optimiser step on batch n."""

    def __init__(self, learner: Learner, data: torch.Tensor, autocast: bool):
        self.learner, self.data, self.autocast = learner, data, autocast
        self.optimiser = AdamW(learner.trained) if learner.trained else None

    def step(self, number: int) -> None:
        """Forward, backward, gradient clipping and AdamW; of the frozen model, forward and backward."""
        batch = number % BATCHES
        with self._context(batch):
            loss = self._loss(self.data[batch])
        loss.backward()
        for parameter, mask in zip(self.learner.trained, self.learner.masks, strict=False):
            parameter.grad.mul_(mask)
        if self.optimiser is not None:
            self._update(self.optimiser)

    def _update(self, optimiser: AdamW) -> None:
        torch.nn.utils.clip_grad_norm_(self.learner.trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    @contextmanager
    def _context(self, batch: int) -> Iterator[None]:
        rows, tokens = self.data.shape[1:]
        kept = self.learner.frozen_layers
        cached = kept.batch(range(batch * rows, (batch + 1) * rows), [tokens] * rows) if kept else nullcontext()
        with cached, torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.autocast):
            yield

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the completions; the head runs on their positions alone."""
        tokens = ids.shape[1]
        positions = torch.arange(tokens - COMPLETION - 1, tokens - 1, device=ids.device)
        logits = self.learner.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=positions
        ).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, -COMPLETION:].flatten())

    def described(self) -> dict[str, int]:
        """Sizes that do not depend on the machine."""
        return {
            "parameters": self.learner.parameters,
            "optimiser_bytes": self.optimiser.state_bytes if self.optimiser else 0,
            "checkpoint_bytes": self.learner.checkpoint_bytes,
            "kept_states_bytes": self.learner.frozen_layers.bytes if self.learner.frozen_layers else 0,
        }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of all methods, interleaved, and the memory of each in a process of its own."""
    base, data, device = set_up(arguments)
    seconds, described = _times(base, data, device, arguments)
    count = sum(parameter.numel() for parameter in base.parameters())
    del base
    gc.collect()
    methods = {}
    for name, taken in seconds.items():
        full, lora = seconds.get("full"), seconds.get("lora-matched")
        methods[name] = described[name] | {
            "seconds": summary(taken["own"]),
            "tokens_a_second": data[0].numel() / summary(taken["own"])["median"],
            "to_frozen": ratios(taken["own"], taken["frozen"]),
            "to_full": _quotient(taken, full),
            "to_lora_matched": _quotient(taken, lora),
            "peak_memory_bytes": _memory_in_fresh_process(name, arguments),
        }
    return {
        "machine": machine(device),
        "shape": arguments.shape,
        "layers": arguments.layers or SHAPES[arguments.shape].num_hidden_layers,
        "model_parameters": count,
        "dtype": _dtype(device),
        "batch": arguments.batch,
        "tokens": arguments.tokens,
        "completion_tokens": COMPLETION,
        "methods": methods,
    }


Seconds = dict[str, list[float]]


def _quotient(taken: Seconds, other: Seconds | None) -> dict[str, float] | None:
    """Ratio to another method: both were timed beside the frozen model, and mostly in the same rounds."""
    if other is None:
        return None
    if len(taken["own"]) == len(other["own"]) and taken["frozen"] == other["frozen"]:
        return ratios(taken["own"], other["own"])
    return ratios(
        [own / frozen for own, frozen in zip(taken["own"], taken["frozen"], strict=True)],
        [own / frozen for own, frozen in zip(other["own"], other["frozen"], strict=True)],
    )


def _times(
    base: LlamaForCausalLM, data: torch.Tensor, device: torch.device, arguments: argparse.Namespace
) -> tuple[dict[str, Seconds], dict[str, dict[str, int]]]:
    large = sum(parameter.numel() for parameter in base.parameters()) > _LARGE
    apart = [name for name in arguments.methods if large and name in DENSE]
    together = [name for name in arguments.methods if name not in apart]
    seconds: dict[str, Seconds] = {}
    described: dict[str, dict[str, int]] = {}
    for group in [together, *([name] for name in apart)]:
        names = list(dict.fromkeys(["frozen", *group]))
        trainings = {name: Training(METHODS[name](twin(base)), data, device.type == "cuda") for name in names}
        steps: dict[str, Callable[[int], None]] = {name: training.step for name, training in trainings.items()}
        taken = interleaved(steps, BATCHES, arguments.rounds, device)
        for name in group:
            seconds[name] = {"own": taken[name], "frozen": taken["frozen"]}
            described[name] = trainings[name].described()
        del trainings, steps
        gc.collect()
    return seconds, described


def set_up(arguments: argparse.Namespace) -> tuple[LlamaForCausalLM, torch.Tensor, torch.device]:
    """Model, batches (`BATCHES`, batch, tokens) and device that the command line asks for."""
    device = torch.device(arguments.device)
    config = LlamaConfig(**SHAPES[arguments.shape].to_dict())
    if arguments.layers:
        config.num_hidden_layers = arguments.layers
    base = fresh_model(config, device, getattr(torch, _dtype(device)))
    generator = torch.Generator().manual_seed(0)
    shape = (BATCHES, arguments.batch, arguments.tokens)
    return base, torch.randint(config.vocab_size, shape, generator=generator).to(device), device


def _dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def _memory_in_fresh_process(name: str, arguments: argparse.Namespace) -> int:
    """Peak memory of one method alone: allocated on a GPU, else the resident set of the process, in bytes."""
    print(f"memory of {name}", file=sys.stderr, flush=True)
    options = ["--memory-of", name]
    for option in ("shape", "device", "batch", "tokens", "layers"):
        options += [f"--{option}", str(getattr(arguments, option))]
    command = [sys.executable, "-m", "benchmarks.training", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def _report_memory(arguments: argparse.Namespace) -> None:
    base, data, device = set_up(arguments)
    training = Training(METHODS[arguments.memory_of](base), data, device.type == "cuda")
    for number in range(BATCHES + 1):
        training.step(number)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    print(json.dumps({"peak_memory_bytes": peak}))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8, help="examples in a batch")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an example")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds, after one epoch of warm-up")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has, to try things out")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        _report_memory(arguments)
        return
    result = measure(arguments)
    name = f"training-{arguments.shape}-{torch.device(arguments.device).type}"
    if arguments.layers or arguments.methods != list(METHODS):
        name = f"trial-{name}"
    write(name, result)


if __name__ == "__main__":
    main()
