"""Vetting: files from elsewhere, looked at before they are loaded, and whether they are what they are said to be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neft.errors import InputError, NeftError
from neft.memory import Memory
from neft.neurons import NeuronSpace
from neft.overlay import Overlay
from neft.routing import Signature
from neft.scoring import Scores
from registry.text import plain

#: What is raised by looking at a file that somebody has made up, before it is loaded, and by what it holds afterwards.
_MALFORMED = (NeftError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError)


def vetted_overlay(path: Path, space: NeuronSpace) -> Overlay:
    """An overlay of that space.

    The shapes of its rows are compared with its neurons before either is loaded, for a few bytes might otherwise
    stand for more rows than fit into memory.

    Raises:
        InputError: it is none.
    """
    return _vetted(path, "overlay", lambda: _overlay(path, space))


def vet(kind: str, path: Path, space: NeuronSpace) -> None:
    """Load the `scores`, `memory` or `signature` of an entry that chose from that space.

    Raises:
        InputError: it is none.
    """
    checks: Mapping[str, Callable[[], None]] = {
        "scores": lambda: _check_scores(path, space),
        "memory": lambda: _check_memory(path),
        "signature": lambda: _check_signature(path),
    }
    _vetted(path, kind, checks[kind])


def _vetted(path: Path, kind: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except _MALFORMED as error:
        reason = str(error).replace(str(path), "it") or type(error).__name__
        raise InputError(f"is no {kind} that could be used: {reason}") from error


def _overlay(path: Path, space: NeuronSpace) -> Overlay:
    _check_space(path, space)
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if {name: shape for name, shape in shapes.items() if name.startswith("rows/")} != _expected_rows(shapes, space):
        raise InputError("its rows do not have the shapes that its neurons have in the model")
    return Overlay.load(path)


def _expected_rows(shapes: Mapping[str, tuple[int, ...]], space: NeuronSpace) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of rows that go with a file's tensors of neurons."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name.startswith("neurons/"):
            for part in space.site(name.removeprefix("neurons/")).parts:
                rows, _ = found.get(f"rows/{part.module}", (0, part.width))
                found[f"rows/{part.module}"] = (rows + shape[0] * part.repeats, part.width)
    return found


def _check_space(path: Path, space: NeuronSpace) -> None:
    """
    Raises:
        InputError: a file of another space; what it describes instead has not been vetted.
    """
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["neft"])["description"]["space"]
    if json.dumps(described, sort_keys=True) != json.dumps(space.to_dict(), sort_keys=True):
        raise InputError("it belongs to another neuron space")


def _check_scores(path: Path, space: NeuronSpace) -> None:
    _check_space(path, space)
    Scores.load(path)


def _check_memory(path: Path) -> None:
    memory = Memory.load(path)
    if not isinstance(memory.policy, str):
        raise InputError("it does not say which policy wrote it")
    plain("its description", memory.description)
    _check_finite(memory.tensors)


def _check_signature(path: Path) -> None:
    found = Signature.load(path)
    _check_finite(
        {"mean": found.mean, "components": found.components, "variances": found.variances}
        | {"noise": torch.tensor(found.noise), "near": torch.tensor(found.near)}
    )
    components, features = found.components.shape
    if found.mean.shape != (features,) or found.variances.shape != (components,):
        raise InputError("its tensors do not go together")
    lengths = [found.depth, 1 if found.max_length is None else found.max_length]
    if not all(type(length) is int and length >= 1 for length in lengths) or not found.noise > 0:
        raise InputError("it holds numbers out of range")


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"tensor {name!r} holds values that are not finite")
