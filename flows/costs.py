"""What a stream run cost: seconds, peak memory, and the bytes that it keeps for each task."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from neft.baselines import Baseline
from registry import Entry


@dataclass
class Costs:
    """Counts from when a run is put on the workbench; a run that goes on counts the time of its last process."""

    training_seconds: float = 0.0
    _start: float = field(default_factory=time.perf_counter)

    def metrics(self, entries: Sequence[Entry], baseline: Baseline | None, tasks: int) -> dict[str, float]:
        """The costs by the names that MLflow shows.

        What is stored are the files of the tasks' entries, their scores included, or, for a baseline, what it holds
        from task to task (`kept_bytes`), since it records none.
        """
        overlays = sum(entry.overlay_file.bytes for entry in entries)
        files = sum(file.bytes for entry in entries for file in entry.files)
        memory = sum(entry.memory_file.bytes for entry in entries if entry.memory_file)
        signatures = sum(entry.signature_file.bytes for entry in entries if entry.signature_file)
        kept = 0 if baseline is None else kept_bytes(baseline)
        return {
            "cost/seconds": time.perf_counter() - self._start,
            "cost/training_seconds": self.training_seconds,
            "cost/peak_memory_bytes": peak_memory(),
            "cost/stored_bytes_per_task": (files + kept) / tasks,
            "cost/overlay_bytes_per_task": overlays / tasks,
            "cost/memory_bytes_per_task": memory / tasks,
            "cost/signature_bytes_per_task": signatures / tasks,
        }


def peak_memory() -> int:
    """Peak resident set of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux `getrusage` counts the parent's too, from before the exec.
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def kept_bytes(baseline: Baseline) -> int:
    """Bytes of the tensors and texts that a baseline holds from task to task: its fields that are no options."""
    described: Any = baseline
    return sum(_bytes(getattr(baseline, each.name, None)) for each in fields(described) if not each.init)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping):
        return sum(_bytes(inner) for inner in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return sum(_bytes(inner) for inner in value)
    if hasattr(value, "__dataclass_fields__"):
        return sum(_bytes(getattr(value, name)) for name in value.__dataclass_fields__)
    return 0
