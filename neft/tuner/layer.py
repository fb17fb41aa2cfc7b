"""NeftLayer: a linear layer whose chosen rows or columns are compact trainable parameters.

On the `inplace` path the chosen rows live in the base weight while the adapter is in use, so that forward is one dense
product; what they replaced is kept aside and copied back, so that the base returns bit for bit. On the `side` path the
base weight is never written and what the rows change is added to its output, which also serves weights that are
quantised or sharded, and batches whose examples have an adapter each.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from neft.errors import InputError
from neft.neurons import ModuleRows, Side, matrix_shape
from neft.overlay import (
    columns,
    dense_dtype,
    is_plain,
    read_rows,
    read_stored,
    storage_dim,
    weight_of,
    write_rows,
    write_stored,
)
from neft.tuner.inplace import InplaceLinear, TracedLinear

#: How an adapter's rows take part in forward.
Path = Literal["inplace", "side"]

#: Name, in `adapter_names`, of the model without any adapter.
BASE = "__base__"

#: Stands for the version of a weight that only a compiled forward has written since it was last looked at.
_COMPILED = -2


class _Version(NamedTuple):
    """What tells one state of an adapter's rows from another."""

    address: int
    writes: int
    trained: bool


class _Laid(NamedTuple):
    """An adapter whose rows are in the base weight now, the version of them, and what they replaced, as stored."""

    adapter: str
    version: _Version
    originals: torch.Tensor


class _Watched(NamedTuple):
    """A tensor, where it is held, and what tells whether it has been replaced or written."""

    holder: Mapping[str, torch.Tensor | None]
    name: str
    tensor: torch.Tensor
    address: int
    writes: int


class NeftLayer(BaseTunerLayer):
    """State of the chosen rows: compact parameters, their positions, and what is laid in the base weight now."""

    adapter_layer_names = ("neft_rows",)
    other_param_names = ("neft_positions", "neft_originals", "sides")

    def __init__(self, base_layer: nn.Module, path: Path = "inplace", **kwargs: Any) -> None:
        self.base_layer = base_layer
        if hasattr(base_layer, "support_avx512bf16_for_cpu"):
            # In inference bitsandbytes would else pack 4-bit weights anew, with a loss, so that rows cannot be read.
            vars(base_layer)["support_avx512bf16_for_cpu"] = False
        self.path = path
        self.neft_rows = nn.ParameterDict({})
        self.neft_positions = BufferDict({}, persistent=True)
        # The base's own rows, which the side path takes the adapter's change from; read when first needed.
        self.neft_originals = BufferDict({}, persistent=False)
        self._originals_version: dict[str, tuple[int, int]] = {}
        self.sides: dict[str, Side] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.kwargs = kwargs
        self._laid: list[_Laid] = []
        self._weight_version = -1
        self._checked: set[str] = set()
        #: What is laid on and not in training, once it is: inference needs no more than a look.
        self._settled: tuple[_Watched, ...] | None = None
        self.out_features, self.in_features = matrix_shape(type(base_layer).__name__, base_layer)

    def update_layer(
        self,
        adapter_name: str,
        side: Side,
        count: int,
        chosen: ModuleRows | None = None,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Add an adapter of `count` rows or columns; without `chosen`, a saved adapter is to be loaded into it."""
        self.restore()
        base = self.get_base_layer()
        if self.path == "inplace":
            self._check_writable()
        length = self.out_features if side == "row" else self.in_features
        if not 0 < count <= length:
            raise InputError(f"adapter {adapter_name!r} trains {count} {side}s of a module that has {length}")
        width = self.in_features if side == "row" else self.out_features
        if chosen is None:
            positions = torch.full((count,), -1)
            rows = torch.zeros(count, width, dtype=dense_dtype(base))
        else:
            positions = torch.from_numpy(chosen.positions.copy())
            rows = read_rows(base, side, positions.to(weight_of(base).device))
        self.sides[adapter_name] = side
        self.neft_positions[adapter_name] = positions
        self.neft_rows[adapter_name] = nn.Parameter(rows, requires_grad=True)
        self._forget()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _check_writable(self) -> None:
        """
        Raises:
            InputError: the base weight cannot hold rows.
        """
        base = self.get_base_layer()
        if not is_plain(base):
            raise InputError(
                f"rows cannot be written into a weight stored as {type(weight_of(base)).__name__}; leave them beside "
                "it with NeftConfig.from_neurons(..., path='side'), and do not merge"
            )

    def _check(self, adapters: tuple[str, ...]) -> None:
        """
        Raises:
            InputError: an adapter's positions were never loaded or lie outside the weight, or two adapters meet.
        """
        for name in adapters:
            if name not in self._checked:
                positions = self.neft_positions[name]
                length = self.out_features if self.sides[name] == "row" else self.in_features
                if (
                    int(positions.min()) < 0
                    or int(positions.max()) >= length
                    or len(positions.unique()) < len(positions)
                ):
                    raise InputError(
                        f"adapter {name!r} has no valid positions for its rows; build its config with "
                        "NeftConfig.from_neurons, or load it with PeftModel.from_pretrained"
                    )
                self._checked.add(name)
        for place, name in enumerate(adapters):
            for other in adapters[:place]:
                if self.sides[name] != self.sides[other] or _share(
                    self.neft_positions[name], self.neft_positions[other]
                ):
                    raise InputError(
                        f"adapters {other!r} and {name!r} train the same weights, so which value counts is undefined; "
                        "activate one of them, or train disjoint neuron sets"
                    )

    @property
    def laid(self) -> tuple[str, ...]:
        """The adapters whose rows the base weight holds now."""
        return tuple(laid.adapter for laid in self._laid)

    def lay(self, adapters: tuple[str, ...]) -> None:
        """Make the base weight hold the rows of `adapters`, over what is merged, and nothing else."""
        base = self.get_base_layer()
        weight = weight_of(base)
        if self.laid != adapters or weight._version != self._weight_version:
            self.restore()
            self._check(adapters)
        versions = tuple(self._rows_version(name) for name in adapters)
        if self._laid and versions == tuple(laid.version for laid in self._laid) and not self._is_trained(adapters):
            return
        for place, (name, version) in enumerate(zip(adapters, versions, strict=True)):
            side, positions = self.sides[name], self.neft_positions[name]
            if place < len(self._laid):
                self._laid[place] = self._laid[place]._replace(version=version)
            else:
                self._laid.append(_Laid(name, version, read_stored(base, side, positions)))
            write_rows(base, side, positions, self.neft_rows[name].detach())
        self._weight_version = weight._version
        self._settled = None if self._is_trained(adapters) else self._watch(adapters)

    def _watch(self, adapters: tuple[str, ...]) -> tuple[_Watched, ...]:
        """The base weight and the rows laid on it, as they are now."""
        base, rows = self.get_base_layer(), self.neft_rows
        held = [(base._parameters, "weight"), *((rows._parameters, name) for name in adapters)]
        return tuple(
            _Watched(holder, name, tensor, tensor.data_ptr(), tensor._version)
            for holder, name in held
            if (tensor := holder[name]) is not None
        )

    def _is_as_laid(self) -> bool:
        """Whether nobody has written the base weight or the rows laid on it since, or wants them trained."""
        assert self._settled is not None
        for holder, name, tensor, address, version in self._settled:
            if (
                holder.get(name) is not tensor
                or tensor._version != version
                or tensor.data_ptr() != address
                or tensor.requires_grad
            ):
                return False
        return True

    def _forget(self) -> None:
        """Look anew at positions, and at the base's rows, when they are next needed."""
        self._checked.clear()
        self.neft_originals.clear()

    def originals(self, adapter: str) -> torch.Tensor:
        """What the base weight itself holds in the adapter's rows, (k, d), dequantised; merged rows count as base."""
        if torch.compiler.is_compiling() and adapter in self.neft_originals:
            return self.neft_originals[adapter]
        base = self.get_base_layer()
        weight = weight_of(base)
        version = (weight.data_ptr(), weight._version)
        if self._originals_version.get(adapter) != version or adapter not in self.neft_originals:
            self._check((adapter,))
            self.neft_originals[adapter] = self.base_rows(adapter, self.neft_positions[adapter])
            self._originals_version[adapter] = (weight.data_ptr(), weight._version)
        return self.neft_originals[adapter]

    def base_rows(self, like: str, index: torch.Tensor) -> torch.Tensor:
        """What the base weight itself holds at `index` (n,), rows or columns as adapter `like` has: (n, d)."""
        self.restore()
        return read_rows(self.get_base_layer(), self.sides[like], index)

    def with_change(self, adapter: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The output `y` (..., out) of the base weight for `x` (..., in), with what the adapter's rows change in it."""
        index, originals = self.neft_positions[adapter], self.originals(adapter)
        # Rows are rounded to the weight's dtype first, as they are on the `inplace` path and in an overlay.
        change = self.neft_rows[adapter].to(originals.dtype).float() - originals.float()
        change = change.to(y.dtype)
        x = x.to(y.dtype)
        if self.sides[adapter] == "row":
            return y.index_add(-1, index, x @ change.T)
        return y + columns(x, index) @ change

    def _rows_version(self, adapter: str) -> _Version:
        rows = self.neft_rows[adapter]
        return _Version(rows.data_ptr(), rows._version, rows.requires_grad)

    def _is_trained(self, adapters: tuple[str, ...]) -> bool:
        """Fused optimisers, and those that write through `.data`, leave no trace in a tensor's version."""
        return any(self.neft_rows[name].requires_grad for name in adapters)

    def restore(self) -> None:
        """Give the base weight back, bit for bit, as it was before the active adapters were laid on it."""
        base = self.get_base_layer()
        self._settled = None
        if self._laid:
            self._check_writable()
        written = self._weight_version not in (_COMPILED, weight_of(base)._version)
        while self._laid:
            name, _, originals = self._laid.pop()
            side, positions = self.sides[name], self.neft_positions[name]
            if written:
                # Somebody wrote the base weight meanwhile: rows that are not the adapter's any more are the base now.
                there, rows = read_rows(base, side, positions), self.neft_rows[name].detach()
                still = (there == rows.to(there)).all(dim=1).nonzero().squeeze(-1)
                positions, originals = positions[still], originals.index_select(storage_dim(base, side), still)
            write_stored(base, side, positions, originals)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.restore()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self.restore()
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.restore()
        self._checked.discard(adapter_name)
        super().delete_adapter(adapter_name)


def _share(first: torch.Tensor, second: torch.Tensor) -> bool:
    return bool(torch.isin(first, second).any())


class NeftLinear(nn.Module, NeftLayer):
    """A linear layer (`nn.Linear`, quantised ones too, or GPT-2's `Conv1D`) with NEFT adapters."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        side: Side,
        count: int,
        chosen: ModuleRows | None = None,
        path: Path = "inplace",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        NeftLayer.__init__(self, base_layer, path, **kwargs)
        self._active_adapter = adapter_name
        self._merged_originals: list[tuple[str, torch.Tensor]] = []
        self.update_layer(adapter_name, side, count, chosen)

    def forward(self, x: torch.Tensor, adapter_names: Sequence[str] | None = None) -> torch.Tensor:
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        # Decoding calls this for every token and layer, so it does nothing there that it need not.
        if (
            self._settled is not None
            and not (x.requires_grad and torch.is_grad_enabled())
            and (torch.compiler.is_compiling() or self._is_as_laid())
        ):
            # `self.base_layer` would go through nn.Module's own lookup, which costs more than the checks above.
            return cast(torch.Tensor, cast(nn.Module, self._modules["base_layer"])(x))
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters: tuple[str, ...] = ()
        if not self.disable_adapters and not self.merged:
            adapters = tuple(name for name in self.active_adapters if name in self.neft_rows)
        if self.path == "side":
            return self._beside(x, adapters)
        rows = [self.neft_rows[name] for name in adapters]
        if torch.is_grad_enabled() and (x.requires_grad or any(values.requires_grad for values in rows)):
            if torch.compiler.is_compiling() and len(adapters) == 1 and self.laid == adapters:
                return self._traced(x, *adapters)
            return InplaceLinear.apply(x, self, adapters, *rows)
        self.lay(adapters)
        return self.dense(x)

    def _beside(self, x: torch.Tensor, adapters: tuple[str, ...]) -> torch.Tensor:
        if len(adapters) > 1:
            self._check(adapters)
        result = self.dense(x)
        for name in adapters:
            result = self.with_change(name, x, result)
        return result

    def _mixed(self, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        """Each example of the batch with its own adapter; `__base__` is the model without any."""
        if self.merged:
            raise InputError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first")
        if len(x) % len(adapter_names):
            raise InputError(
                f"adapter_names has {len(adapter_names)} names for a batch of {len(x)}; give one per example"
            )
        # Beam search repeats every example, and some models flatten batch and tokens before the feed-forward block.
        examples = x.unflatten(0, (len(adapter_names), -1))
        self.restore()
        result = self.dense(x).unflatten(0, examples.shape[:2])
        for name in dict.fromkeys(adapter_names):
            if name in self.neft_rows:
                mine = torch.tensor([place for place, other in enumerate(adapter_names) if other == name]).to(x.device)
                changed = self.with_change(name, examples[mine], result[mine])
                result = result.index_copy(0, mine, changed)
        return result.flatten(0, 1)

    def _traced(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Forward as `torch.compile` sees it, once the adapter has been laid on: no state but tensors."""
        base = self.get_base_layer()
        weight, rows, index = weight_of(base), self.neft_rows[adapter], self.neft_positions[adapter]
        with torch.no_grad():
            write_rows(base, self.sides[adapter], index, rows)
        self._weight_version = _COMPILED
        matrix = weight if storage_dim(base, "row") == 0 else weight.T
        return TracedLinear.apply(x, matrix, base.bias, rows, index, self.sides[adapter])

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's own product, with what its weight holds now."""
        result: torch.Tensor = self.base_layer(x)
        return result

    def dense_input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """Gradient of the input, (..., in), from that of the output, (..., out)."""
        base = self.get_base_layer()
        weight = weight_of(base).to(grad.dtype)
        return grad @ (weight if storage_dim(base, "row") == 0 else weight.T)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' rows into the base weight to stay, until `unmerge`.

        Raises:
            InputError: two of the adapters train the same weights, or the weight is quantised or sharded.
            ValueError: with `safe_merge`, rows that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.neft_rows]
        if not names:
            return
        self._check_writable()
        self.restore()
        self._check((*self.merged_adapters, *names))
        for name in names:
            rows = self.neft_rows[name].detach()
            if safe_merge and not torch.isfinite(rows).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            positions = self.neft_positions[name]
            originals = read_rows(self.get_base_layer(), self.sides[name], positions)
            self._merged_originals.append((name, originals))
            write_rows(self.get_base_layer(), self.sides[name], positions, rows)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged rows out of the base weight, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.restore()
        while self._merged_originals:
            name, originals = self._merged_originals.pop()
            write_rows(self.get_base_layer(), self.sides[name], self.neft_positions[name], originals)
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """PEFT's hook for taking this layer out of the model, with or without what it learnt."""
        self.restore()
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.get_base_layer()

    # Copies, saved states and moved models are taken of the base as it is without what is laid on it; the next forward
    # lays the rows on again.

    def __getstate__(self) -> object:
        self.restore()
        return super().__getstate__()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.restore()
        self._forget()
        return super()._apply(*args, **kwargs)

    def __repr__(self) -> str:
        return "neft." + super().__repr__()
