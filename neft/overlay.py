"""Overlay: a task's trained rows. Laid on a model they replace its rows; what they replace is itself an overlay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from neft.errors import FailedError, InputError
from neft.files import PathLike, load_tensors, save_tensors, understood
from neft.neurons import ModuleRows, NeuronSet, NeuronSpace, Side, matrix_shape

_FILE_KIND = "neft-overlay"
#: What rows are trained in.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: What becomes of rows that several overlays or adapters have, when they are united.
Shared = Literal["error", "last", "mean", "sum"]


def weight_of(module: nn.Module) -> torch.Tensor:
    """A linear module's weight, as it is stored."""
    return cast(torch.Tensor, module.weight)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The values of a linear module's weight; a copy where it is stored quantised or sharded.

    Raises:
        InputError: bitsandbytes has packed the weight for inference on the CPU, which loses its values.
    """
    if getattr(getattr(weight_of(module), "quant_state", None), "packing_format_for_cpu", False):
        raise InputError(
            "bitsandbytes has packed the weights for inference on the CPU, so rows cannot be read from them; load the "
            "model anew, and add the adapter before the first forward"
        )
    if type(weight_of(module)).__name__ == "Int8Params":
        return _eight_bit_weight(module)
    # Imported here, since importing PEFT imports `neft.tuner`, which needs this module.
    from peft.utils.integrations import dequantize_module_weight

    return whole(cast(torch.Tensor, dequantize_module_weight(module)).detach())


def _eight_bit_weight(module: nn.Module) -> torch.Tensor:
    """The values of an 8-bit weight of bitsandbytes, whose row maxima move to `state` at its first forward.

    PEFT's function loses them on the CPU (0.21.2): it sets the weight anew.
    """
    weight: Any = weight_of(module)
    state: Any = module.state
    maxima: torch.Tensor = state.SCB if weight.SCB is None else weight.SCB
    return weight.detach().float() * (maxima.to(weight.device) / 127)[:, None]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself or, where processes hold a shard of it each, all of it; every process must ask."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def dense_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of `dense_weight(module)`."""
    weight = weight_of(module)
    return weight.dtype if weight.is_floating_point() else dense_weight(module).dtype


def is_plain(module: nn.Module) -> bool:
    """Whether the weight is stored as it is, so that rows can be written into it: not quantised, not sharded."""
    return type(weight_of(module)) in (torch.Tensor, nn.Parameter)


def storage_dim(module: nn.Module, side: Side) -> int:
    """The dimension of `module.weight` along which rows, or columns, are counted (Conv1D stores (in, out))."""
    return int(isinstance(module, Conv1D)) ^ int(side == "column")


def read_stored(module: nn.Module, side: Side, index: torch.Tensor) -> torch.Tensor:
    """A copy of the rows or columns `index` (k,) of a module's weight, the way round in which it is stored."""
    weight = dense_weight(module)
    return weight.index_select(0, index) if storage_dim(module, side) == 0 else columns(weight, index)


@torch.no_grad()
def write_stored(module: nn.Module, side: Side, index: torch.Tensor, values: torch.Tensor) -> None:
    """Write what `read_stored` gave, or the like, over the rows or columns `index` (k,) of a module's weight."""
    weight_of(module).index_copy_(storage_dim(module, side), index, values)


def read_rows(module: nn.Module, side: Side, index: torch.Tensor) -> torch.Tensor:
    """A copy of the rows or columns `index` (k,) of a module's weight: (k, d), each one neuron's vector."""
    picked = read_stored(module, side, index)
    return picked if storage_dim(module, side) == 0 else picked.T.contiguous()


def write_rows(module: nn.Module, side: Side, index: torch.Tensor, values: torch.Tensor) -> None:
    """Write `values` (k, d) over the rows or columns `index` (k,) of a module's weight, in the weight's dtype."""
    weight = weight_of(module)
    values = values.detach().to(device=weight.device, dtype=weight.dtype)
    # Columns lie apart in memory: turning the values first halves the time of writing them.
    write_stored(module, side, index, values if storage_dim(module, side) == 0 else values.T.contiguous())


def columns(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns `index` (k,) of `values` (..., d), as (..., k)."""
    if values.device.type == "cpu":
        # There `index_select` along the last dimension runs on one core.
        return values.gather(-1, index.expand(*values.shape[:-1], -1))
    return values.index_select(-1, index)


@dataclass(frozen=True)
class Change:
    """What one adapter or overlay makes of a weight: its rows (k, d) at `positions` (k,), taken `weight` times."""

    positions: torch.Tensor
    rows: torch.Tensor
    weight: float = 1.0


def unite(
    changes: Sequence[Change], shared: Shared, originals: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several changes of the same weight as one: sorted positions (u,) and rows (u, d), in the changes' dtype.

    Rows that one change alone has, with weight 1, are taken over bit for bit. A weight w stands for the row
    `base + w (row - base)`, as task arithmetic has it (arXiv 2212.04089).

    Args:
        shared: what becomes of a row that several have: `error`, the `last` one's, their `mean`, or the base's row and
            the `sum` of what each changes in it.
        originals: the base's rows (n, d) at given positions (n,).

    Raises:
        InputError: `shared` is `error`, and there are such rows.
    """
    positions, owners = torch.cat([change.positions for change in changes]).unique(sorted=True, return_counts=True)
    many = owners > 1
    if shared == "error" and bool(many.any()):
        raise InputError(f"{int(many.sum())} rows belong to several; name what becomes of them: last, mean or sum")
    base = originals(positions).double()
    rows, total = torch.empty_like(base), torch.zeros_like(base)
    for change in changes:
        place = torch.searchsorted(positions, change.positions)
        values = change.rows.detach().double()
        if change.weight != 1.0:
            values = base[place] + change.weight * (values - base[place])
        rows[place] = values
        total[place] += values - base[place]
    if shared in ("mean", "sum"):
        divisor = owners[many, None] if shared == "mean" else 1
        rows[many] = base[many] + total[many] / divisor
    return positions, rows.to(reduce(torch.promote_types, (change.rows.dtype for change in changes)))


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
        """A copy of what `model` holds now in the rows of `neurons`.

        Raises:
            InputError: the neurons belong to another model, or `model` has an adapter in it.
        """
        return cls(
            neurons,
            {
                name: read_rows(module, rows.side, _index(rows, module))
                for name, module, rows in _chosen(model, neurons)
            },
        )

    def lay_on(self, model: nn.Module) -> Overlay:
        """Write the rows into the base model `model`, in place; returns what was there, to take them off again.

        Raises:
            InputError: the overlay belongs to another model, or `model` has an adapter in it; nothing is written.
        """
        before = Overlay.read(model, self.neurons)
        for name, there in before.values.items():
            if self.values[name].shape != there.shape:
                raise InputError(
                    f"overlay rows for module {name!r} are {tuple(self.values[name].shape)}, "
                    f"the model's {tuple(there.shape)}: it was trained on another model"
                )
        for name, module, rows in _chosen(model, self.neurons):
            write_rows(module, rows.side, _index(rows, module), self.values[name])
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
    def load(cls, path: PathLike, verified: bool = False) -> Overlay:
        """
        Args:
            verified: as `load_tensors` has it.

        Raises:
            InputError: no such file, or not an overlay.
            FailedError: the file is corrupt, or holds values that are not finite.
        """
        tensors, description = load_tensors(path, _FILE_KIND, verified)
        with understood(path):
            neurons = NeuronSet.from_tensors(NeuronSpace.from_dict(description["space"]), _under("neurons/", tensors))
            values = _under("rows/", tensors)
            for name, rows in values.items():
                if rows.dim() != 2 or rows.dtype not in _DTYPES:
                    raise FailedError(f"{path} holds {rows.dim()}-dimensional {rows.dtype} as rows of module {name!r}")
                if not all_finite(rows):
                    raise FailedError(f"{path} holds values that are not finite, in module {name!r}")
            return cls(neurons, values)


def all_finite(rows: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN."""
    # Neither goes away in a sum, which takes a fraction of the time; but finite values may add up to infinity.
    return bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all())


class Layers:
    """Overlays laid on one another, the oldest first: what they make of a model, module by module.

    Of many overlays each weight is gone through once, which is what laying on costs.
    """

    def __init__(self, model: nn.Module, overlays: Sequence[Overlay], keep: bool = True) -> None:
        """
        Args:
            model: the base model, nothing laid on.
            keep: what the layers replace, in as much memory, to take them off again.

        Raises:
            InputError: an overlay of another model; nothing is written.
        """
        self._modules: dict[str, tuple[nn.Module, list[tuple[Side, torch.Tensor, torch.Tensor]]]] = {}
        self._replaced: dict[str, list[tuple[Side, torch.Tensor, torch.Tensor]]] | None = {} if keep else None
        for overlay in overlays:
            for name, module, rows in _chosen(model, overlay.neurons):
                values, width = overlay.values[name], matrix_shape(name, module)[1 if rows.side == "row" else 0]
                if values.shape != (len(rows.positions), width):
                    raise InputError(
                        f"overlay rows for module {name!r} are {tuple(values.shape)}, the model's "
                        f"{(len(rows.positions), width)}: it was trained on another model"
                    )
                index = _index(rows, module)
                self._modules.setdefault(name, (module, []))[1].append((rows.side, index, values))

    @property
    def weights(self) -> dict[str, str]:
        """Name of each weight that is written -> its module's."""
        return {f"{name}.weight": name for name in self._modules}

    @torch.no_grad()
    def lay_on(self, name: str) -> None:
        """Write what the overlays have of one module."""
        module, layers = self._modules[name]
        if self._replaced is not None:
            kept = self._replaced[name] = []
            for side in dict.fromkeys(side for side, _, _ in layers):
                index = torch.cat([index for other, index, _ in layers if other == side]).unique()
                kept.append((side, index, read_rows(module, side, index)))
        for side, together in groupby(layers, key=lambda layer: layer[0]):
            weight = weight_of(module)
            apart = storage_dim(module, side) == 1
            # Columns lie apart in memory: turned twice, they are written as rows are, however many layers there are.
            turned = weight.T.contiguous() if apart else weight
            for _, index, values in together:
                turned.index_copy_(0, index, values.to(device=weight.device, dtype=weight.dtype))
            if apart:
                weight.copy_(turned.T)

    def take_off(self) -> None:
        """Write back, bit for bit, whatever was there, if it was kept."""
        for name, kept in (self._replaced or {}).items():
            # A row and a column cross; both were read before anything was written.
            for side, index, values in kept:
                write_rows(self._modules[name][0], side, index, values)
        self._replaced = {}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _index(rows: ModuleRows, module: nn.Module) -> torch.Tensor:
    return torch.from_numpy(rows.positions.copy()).to(weight_of(module).device)


def _chosen(model: nn.Module, neurons: NeuronSet) -> Iterator[tuple[str, nn.Module, ModuleRows]]:
    """Name, module and rows of a set in a model, checked to be there."""
    for name, rows in neurons.rows().items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"the model has no module {name!r}: the neurons belong to another model") from error
        if hasattr(module, "base_layer"):
            raise InputError(f"module {name!r} has an adapter in it; call unload() or merge_and_unload() first")
        length = matrix_shape(name, module)[0 if rows.side == "row" else 1]
        if rows.positions[-1] >= length:
            raise InputError(
                f"module {name!r} has {length} {rows.side}s, but the neurons own {rows.side} {rows.positions[-1]}: "
                "they belong to another model"
            )
        yield name, module, rows
