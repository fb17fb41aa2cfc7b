"""The audit: digests of a model's weights, their identity, and the proof that only what a task trained has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, cast

import torch
from torch import nn

from neft.files import tensor_bytes, tensors_digest
from neft.neurons import ModuleRows, NeuronSet
from neft.overlay import storage_dim

#: Keys of a transformers config that say nothing about what the model computes, or nothing that its weights do not say:
#: saving a model and loading it again fills them in.
_NOT_IDENTITY = frozenset(
    {"_name_or_path", "transformers_version", "use_cache", "_attn_implementation_autoset", "architectures", "dtype"}
)


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name, tied ones once, in a fixed order."""
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def state_digest(model: nn.Module) -> str:
    """SHA-256 of every weight of the model: two states are bit-identical when their digests are."""
    return tensors_digest(_weights(model))


def digests_around(model: nn.Module, change: Mapping[str, Callable[[], None]]) -> tuple[str, str]:
    """`state_digest` of the model before and after a change that is made weight by weight.

    Weights go through both digests side by side, which takes the time of one.

    Args:
        change: weight name -> what changes it; all are called, each once.
    """
    left = dict(change)
    changed: SimpleQueue[tuple[str, torch.Tensor] | None] = SimpleQueue()

    def changing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in _weights(model):
            # The digest asks for the next weight when it is done with this one.
            yield name, tensor
            if name in left:
                left.pop(name)()
            changed.put((name, tensor))

    with ThreadPoolExecutor(1) as pool:
        after = pool.submit(lambda: tensors_digest(cast(Iterator[tuple[str, torch.Tensor]], iter(changed.get, None))))
        try:
            before = tensors_digest(changing())
        finally:
            changed.put(None)
        found = after.result()
    if left:
        # A weight that goes by another name too, under which it came.
        for work in left.values():
            work()
        found = state_digest(model)
    return before, found


def base_fingerprint(model: nn.Module, state: str | None = None) -> str:
    """SHA-256 of a base model's weights and config: the identity that entries are recorded for.

    Args:
        state: the `state_digest` of the untouched model, where it is known.
    """
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if config is not None else {}
    identity = {key: value for key, value in described.items() if key not in _NOT_IDENTITY}
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(f"{text}\0{state or state_digest(model)}".encode()).hexdigest()


@dataclass(frozen=True)
class AuditResult:
    """Whether every weight outside what was trained is bit-identical to what it was, and where it is not."""

    identical: bool
    tensors: int
    parameters_outside: int
    changed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "tensors": self.tensors,
            "parameters_outside": self.parameters_outside,
            "changed": list(self.changed),
        }


class Audit:
    """Remembers a digest of each weight tensor outside a neuron set, and compares it after the task.

    One tensor is copied at a time, so that an audit costs no second model in memory.
    """

    def __init__(self, model: nn.Module, neurons: NeuronSet):
        self._rows = neurons.rows()
        self._before, self._outside = self._digests(model)

    def compare(self, model: nn.Module) -> AuditResult:
        """Compare `model` as it is now, without an adapter around it, with what it was."""
        after, _ = self._digests(model)
        changed = [name for name in sorted(self._before | after) if self._before.get(name) != after.get(name)]
        return AuditResult(not changed, len(self._before), self._outside, tuple(changed))

    def _digests(self, model: nn.Module) -> tuple[dict[str, str], int]:
        dims = _row_dims(model, self._rows)
        digests: dict[str, str] = {}
        outside = 0
        for name, tensor in _weights(model):
            outside += tensor.numel()
            if name in dims:
                dim, index = dims[name]
                outside -= len(index) * (tensor.numel() // tensor.shape[dim])
                kept = tensor.detach().clone().index_fill_(dim, index.to(tensor.device), 0)
            else:
                kept = tensor
            digests[name] = hashlib.sha256(tensor_bytes(kept)).hexdigest()
        return digests, outside


class WeightAudit:
    """Remembers a digest of each weight tensor, and compares those that were not trained after the task."""

    def __init__(self, model: nn.Module):
        self._before = _digests(model)

    def compare(self, model: nn.Module, trained: Collection[str]) -> AuditResult:
        """Compare the plain `model` as it is now with what it was, the weights named in `trained` aside."""
        after = _digests(model)
        outside = sorted((self._before.keys() | after.keys()) - set(trained))
        changed = tuple(name for name in outside if self._before.get(name) != after.get(name))
        sizes = {name: tensor.numel() for name, tensor in _weights(model)}
        return AuditResult(not changed, len(outside), sum(sizes.get(name, 0) for name in outside), changed)


def _digests(model: nn.Module) -> dict[str, str]:
    return {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in _weights(model)}


def trained_weights(model: nn.Module) -> frozenset[str]:
    """Names of the plain model's weights that training `model` may change: itself, or what its adapter is merged into.

    Args:
        model: a plain model, or a PEFT model around one, ready to be trained.
    """
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap else model
    # A tied weight goes by each of its names.
    trained = {name for name, weight in base.named_parameters(remove_duplicate=False) if weight.requires_grad}
    adapted = {f"{name}.weight" for name, module in base.named_modules() if hasattr(module, "base_layer")}
    return frozenset(trained | adapted)


def _row_dims(model: nn.Module, rows: Mapping[str, ModuleRows]) -> dict[str, tuple[int, torch.Tensor]]:
    """Weight name -> the dimension and the positions along it that the neuron set owns."""
    return {
        f"{name}.weight": (
            storage_dim(model.get_submodule(name), chosen.side),
            torch.from_numpy(chosen.positions.copy()),
        )
        for name, chosen in rows.items()
    }
