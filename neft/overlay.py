"""Overlay: a task's trained rows. Laid on a model they replace its rows; what they replace is itself an overlay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neft.errors import FailedError, InputError
from neft.files import PathLike, load_tensors, save_tensors
from neft.neurons import ModuleRows, NeuronSet, NeuronSpace, Side

_FILE_KIND = "neft-overlay"


def storage_dim(module: nn.Module, side: Side) -> int:
    """The dimension of `module.weight` along which rows, or columns, are counted (Conv1D stores (in, out))."""
    return int(isinstance(module, Conv1D)) ^ int(side == "column")


def read_rows(module: nn.Module, rows: ModuleRows) -> torch.Tensor:
    """A copy of the chosen rows or columns of a module's weight: (k, d), each one neuron's vector."""
    index = torch.from_numpy(rows.positions.copy()).to(module.weight.device)
    dim = storage_dim(module, rows.side)
    picked = module.weight.detach().index_select(dim, index)
    return picked if dim == 0 else picked.T.contiguous()


@torch.no_grad()
def write_rows(module: nn.Module, side: Side, index: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` (k, d) over the rows or columns `index` (k,) of a module's weight, in the weight's dtype."""
    dim = storage_dim(module, side)
    values = values.to(device=module.weight.device, dtype=module.weight.dtype)
    module.weight.index_copy_(dim, index, values if dim == 0 else values.T)


@dataclass(frozen=True)
class Overlay:
    """The rows of a neuron set, as trained: module name -> (k, d) tensor, in the order of `neurons.rows()`.

    Rows are whole values, not differences, so that laying them on is exact.
    """

    neurons: NeuronSet
    values: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: the modules or shapes are not those of the neuron set.
        """
        rows = self.neurons.rows()
        if rows.keys() != self.values.keys():
            odd = sorted(rows.keys() ^ self.values.keys())
            raise InputError(f"overlay and neuron set disagree on modules: {', '.join(odd[:3])}")
        for module, chosen in rows.items():
            if len(self.values[module]) != len(chosen.positions):
                raise InputError(
                    f"overlay has {len(self.values[module])} rows for module {module!r}, "
                    f"its neuron set {len(chosen.positions)}"
                )
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))

    @classmethod
    def read(cls, model: nn.Module, neurons: NeuronSet) -> Overlay:
        """A copy of what `model` holds now in the rows of `neurons`."""
        return cls(
            neurons, {module: read_rows(_module(model, module), rows) for module, rows in neurons.rows().items()}
        )

    def lay_on(self, model: nn.Module) -> Overlay:
        """Write the rows into the base model `model`, in place; returns what was there, to take them off again."""
        before = Overlay.read(model, self.neurons)
        for name, rows in self.neurons.rows().items():
            module = _module(model, name)
            index = torch.from_numpy(rows.positions.copy()).to(module.weight.device)
            if self.values[name].shape != before.values[name].shape:
                raise InputError(
                    f"overlay rows for module {name!r} are {tuple(self.values[name].shape)}, "
                    f"the model's {tuple(before.values[name].shape)}: it was trained on another model"
                )
            write_rows(module, rows.side, index, self.values[name])
        return before

    @property
    def parameters(self) -> int:
        return sum(values.numel() for values in self.values.values())

    def save(self, path: PathLike) -> None:
        """Write the rows and their neuron set to one safetensors file, whole or not at all."""
        tensors = {f"rows/{name}": values for name, values in self.values.items()}
        tensors |= {f"neurons/{site}": indices for site, indices in self.neurons.to_tensors().items()}
        save_tensors(path, _FILE_KIND, tensors, {"space": self.neurons.space.to_dict()})

    @classmethod
    def load(cls, path: PathLike) -> Overlay:
        """
        Raises:
            InputError: no such file, or not an overlay.
            FailedError: the file is corrupt, or holds values that are not finite.
        """
        tensors, description = load_tensors(path, _FILE_KIND)
        neurons = NeuronSet.from_tensors(NeuronSpace.from_dict(description["space"]), _under("neurons/", tensors))
        values = _under("rows/", tensors)
        for name, rows in values.items():
            if not torch.isfinite(rows).all():
                raise FailedError(f"{path} holds values that are not finite, in module {name!r}")
        return cls(neurons, values)


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"the model has no module {name!r}: the neurons belong to another model") from error
