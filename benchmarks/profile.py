"""Where a step's time goes: `python -m benchmarks.profile`, operator by operator, of the frozen model and of neft.

Needs torch, transformers and peft alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import machine, write
from benchmarks.peers import METHODS, SHAPES
from benchmarks.training import BATCHES, Training, set_up

_STEPS = 3
_OPERATORS = 14


def _operators(training: Training, device: torch.device) -> dict[str, float]:
    """Milliseconds a step that each operator takes itself, without those that it calls."""
    for number in range(BATCHES):
        training.step(number)
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        for number in range(_STEPS):
            training.step(number)
    key = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    return {event.key: getattr(event, key) / 1e3 / _STEPS for event in recorded.key_averages()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The operators that take most time in either, in both."""
    taken = {}
    for name in ("frozen", "neft"):
        base, data, device = set_up(arguments)
        taken[name] = _operators(Training(METHODS[name](base), data, device.type == "cuda"), device)
    names = sorted(taken["frozen"] | taken["neft"], key=lambda name: -max(each.get(name, 0) for each in taken.values()))
    shown = names[:_OPERATORS]
    return {
        "machine": machine(device),
        "shape": arguments.shape,
        "milliseconds": {name: {key: each.get(name, 0.0) for key, each in taken.items()} for name in shown},
        "total": {key: sum(each.values()) for key, each in taken.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure as the command line says, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=0)
    arguments = parser.parse_args(argv)
    write(f"profile-{arguments.shape}-{torch.device(arguments.device).type}", measure(arguments))


if __name__ == "__main__":
    main()
