"""Measuring: steps interleaved in one process, medians with their spread, the machine, and results on disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_LIBRARIES = ("torch", "transformers", "peft", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, and the command that did it."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def interleaved(
    steps: Mapping[str, Callable[[int], None]], warmup: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, `rounds` of each after `warmup` that are not kept.

    In every round each step runs once, on the same batch number, so that whatever slows the machine down for a while
    slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for number in range(warmup + rounds):
        for name, step in steps.items():
            taken = _timed(step, number, device)
            if number >= warmup:
                seconds[name].append(taken)
        _say(f"round {number + 1} of {warmup + rounds}, {time.perf_counter() - start:.0f} s")
    return seconds


def _timed(step: Callable[[int], None], number: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step(number)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and how many values."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "low": low, "high": high, "count": len(values)}


def ratios(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios, round by round."""
    return summary([value / other for value, other in zip(values, reference, strict=True)])


def peak_resident() -> int:
    """Peak resident set of this process, in bytes. `getrusage` would count the parent's, from before the exec, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def write(name: str, result: Mapping[str, Any]) -> None:
    """Write a result to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    _say(f"wrote {path.relative_to(ROOT)}; `python -m benchmarks.page` makes docs/benchmarks.md of it")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
