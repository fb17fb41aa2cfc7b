"""NeftModel: puts NEFT layers into a model, and reads a task's overlay out of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from neft.errors import InputError, nearest
from neft.neurons import ModuleRows, NeuronSet, Side
from neft.overlay import Change, Overlay, Shared, dense_dtype, unite, whole
from neft.tuner.config import NeftConfig
from neft.tuner.layer import BASE, NeftLinear, Path


class NeftModel(BaseTuner):
    """NeFT as a PEFT method: trains chosen neurons of a model and nothing else (after arXiv 2403.11621).

    Example:
        >>> space = NeuronSpace.from_model(model)
        >>> neurons = NeuronSet(space, {"model.layers.0.ffn": range(10)})
        >>> peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    """

    prefix: str = "neft_"
    tuner_layer_cls = NeftLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - the name and type are PEFT's

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        config = cast(NeftConfig, peft_config)
        return key in config.rows or key in config.columns

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        if not cast(NeftConfig, peft_config).target_modules:
            raise InputError("NeftConfig names no rows or columns; build it with NeftConfig.from_neurons")
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(NeftConfig, peft_config)
        side: Side = "row" if current_key in config.rows else "column"
        count = (config.rows if side == "row" else config.columns)[current_key]
        chosen = config.positions.get(current_key)
        if isinstance(target, NeftLinear):
            if target.path != config.path:
                raise InputError(
                    f"adapter {adapter_name!r} has path {config.path!r}, but the model's layers run {target.path!r}; "
                    "give all adapters of a model the same path"
                )
            target.update_layer(adapter_name, side, count, chosen)
            if adapter_name not in self.active_adapters:
                target.neft_rows[adapter_name].requires_grad_(False)
            return
        layer = NeftLinear(target, adapter_name, side, count, chosen, cast(Path, config.path))
        if adapter_name not in self.active_adapters:
            layer.neft_rows[adapter_name].requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            InputError: a module that the config names is not in the model, or shares its weight with another.
        """
        config = cast(NeftConfig, self.peft_config[adapter_name])
        missing = sorted((config.rows.keys() | config.columns.keys()) - {name for name, _ in model.named_modules()})
        if missing:
            raise InputError(f"the model has no module {missing[0]!r}: the neurons belong to another model")
        _check_untied(model, config.rows.keys() | config.columns.keys())
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT makes a new, trainable parameter of what it casts; here what was frozen stays so."""
        frozen = [
            layer
            for _, layer in self._layers()
            if adapter_name in layer.neft_rows and not layer.neft_rows[adapter_name].requires_grad
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in frozen:
            layer.neft_rows[adapter_name].requires_grad_(False)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        adapter_name: str,
        weights: Sequence[float] | None = None,
        combination_type: Shared = "error",
    ) -> None:
        """Unite adapters into a new one, without training; rows that one alone trains are taken over bit for bit.

        Args:
            adapters: names of adapters of this model.
            adapter_name: name of the new one; it is not made active.
            weights: how many times each adapter's change is taken; once by default.
            combination_type: what becomes of rows that several adapters train: `error`, the `last` one's, their
                `mean`, or the base's row and the `sum` of what each changes in it.

        Raises:
            InputError: an unknown adapter or combination, a name that is taken, or, by `error`, shared rows.
        """
        weights = [1.0] * len(adapters) if weights is None else list(weights)
        self._check_union(adapters, adapter_name, weights, combination_type)
        united: dict[str, tuple[Side, torch.Tensor, torch.Tensor]] = {}
        for name, layer in self._layers():
            held = [(each, weight) for each, weight in zip(adapters, weights, strict=True) if each in layer.neft_rows]
            if not held:
                continue
            sides = {layer.sides[each] for each, _ in held}
            if len(sides) > 1:
                raise InputError(f"module {name!r}: some of the adapters train its rows and some its columns")
            changes = [Change(layer.neft_positions[each], layer.neft_rows[each], weight) for each, weight in held]
            try:
                united[name] = (sides.pop(), *unite(changes, combination_type, partial(layer.base_rows, held[0][0])))
            except InputError as error:
                raise InputError(f"module {name!r}: {error}") from error
        self._add_united(adapter_name, adapters, united)

    def _check_union(
        self, adapters: Sequence[str], adapter_name: str, weights: Sequence[float], combination_type: str
    ) -> None:
        if not adapters or len(weights) != len(adapters):
            raise InputError(f"{len(weights)} weights for {len(adapters)} adapters; give at least one, and one each")
        for name in adapters:
            if name not in self.peft_config:
                raise InputError(f"unknown adapter {name!r}; {nearest(name, self.peft_config)}")
            if cast(NeftConfig, self.peft_config[name]).modules_to_save:
                raise InputError(f"adapter {name!r} has modules_to_save, which cannot be united; merge it instead")
        if any(layer.merged for _, layer in self._layers()):
            raise InputError("adapters cannot be united while some are merged; call unmerge_adapter() first")
        if adapter_name in self.peft_config:
            raise InputError(f"there is an adapter {adapter_name!r} already; choose another name")
        if combination_type not in get_args(Shared):
            raise InputError(
                f"unknown combination_type {combination_type!r}; {nearest(combination_type, get_args(Shared))}"
            )

    def _add_united(
        self,
        adapter_name: str,
        adapters: Sequence[str],
        united: Mapping[str, tuple[Side, torch.Tensor, torch.Tensor]],
    ) -> None:
        configs = [cast(NeftConfig, self.peft_config[name]) for name in adapters]
        spaces = {config.space for config in configs}
        config = replace(
            configs[0],
            space=spaces.pop() if len(spaces) == 1 else None,
            rows={name: len(index) for name, (side, index, _) in united.items() if side == "row"},
            columns={name: len(index) for name, (side, index, _) in united.items() if side == "column"},
        )
        config.positions = {name: ModuleRows(side, index.cpu().numpy()) for name, (side, index, _) in united.items()}
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, layer in self._layers():
            if name in united:
                layer.neft_rows[adapter_name] = nn.Parameter(united[name][2], requires_grad=False)

    def _layers(self) -> Iterator[tuple[str, NeftLinear]]:
        """The NEFT layers, by the names that their modules have in the base model."""
        for name, module in self.model.named_modules():
            if isinstance(module, NeftLinear):
                yield name, module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's way of handing `adapter_names` of a mixed batch to the layers, in `forward` and `generate`."""
        self._check_sharding()
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        names = list(names)
        if self.training:
            raise InputError("adapter_names cannot be used while the model is in training mode; call eval() first")
        for name in names:
            if name != BASE and name not in self.peft_config:
                raise InputError(
                    f"unknown adapter {name!r} in adapter_names; {nearest(name, [*self.peft_config, BASE])}"
                )
        # What `generate` is given is seen here, and what `forward` is given on its way to the model.
        _check_batch(names, self, args, kwargs)
        handles = [self.register_forward_pre_hook(partial(_check_batch, names), with_kwargs=True)]
        for module in self.model.modules():
            if isinstance(module, NeftLinear | AuxiliaryTrainingWrapper):
                handles.append(module.register_forward_pre_hook(partial(_hand_over, names), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_sharding(self) -> None:
        """
        Raises:
            InputError: FSDP2 shards layers of the `inplace` path: it forgets what is written into a gathered weight.
        """
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        from torch.distributed.fsdp import FSDPModule

        sharded = any(isinstance(module, FSDPModule) for module in self.modules())
        if sharded and any(layer.path == "inplace" for _, layer in self._layers()):
            raise InputError(
                "path 'inplace' cannot keep rows in weights that are sharded; leave them beside the weights with "
                "NeftConfig.from_neurons(..., path='side')"
            )

    def overlay(self, neurons: NeuronSet, adapter_name: str = "default") -> Overlay:
        """The trained rows of `neurons`, in the dtype of the weights that they stand in.

        Raises:
            InputError: the adapter does not train exactly these neurons.
        """
        values: dict[str, torch.Tensor] = {}
        for name, rows in neurons.rows().items():
            layer = self.model.get_submodule(name)
            if not isinstance(layer, NeftLinear) or adapter_name not in layer.neft_rows:
                raise InputError(f"adapter {adapter_name!r} does not train module {name!r}, which the neuron set names")
            positions = layer.neft_positions[adapter_name].cpu()
            if layer.sides[adapter_name] != rows.side or not torch.equal(positions, torch.from_numpy(rows.positions)):
                raise InputError(f"adapter {adapter_name!r} trains other {rows.side}s of module {name!r}")
            dtype = dense_dtype(layer.get_base_layer())
            values[name] = whole(layer.neft_rows[adapter_name].detach()).to(dtype).cpu().clone()
        return Overlay(neurons, values)


def trained_rows(model: nn.Module) -> dict[str, nn.Parameter]:
    """Module name, as in the base model -> the compact rows (k, d) of its active adapter that are in training.

    Raises:
        InputError: several adapters of one module are in training.
    """
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    found: dict[str, nn.Parameter] = {}
    for name, module in (unwrap() if unwrap else model).named_modules():
        if isinstance(module, NeftLinear):
            trained = [rows for rows in module.neft_rows.values() if rows.requires_grad]
            if len(trained) > 1:
                raise InputError(f"module {name!r} trains the rows of {len(trained)} adapters; train one at a time")
            if trained:
                found[name] = trained[0]
    return found


def _check_untied(model: nn.Module, names: Collection[str]) -> None:
    """
    Raises:
        InputError: one of the modules shares its weight with another, which would change with it unseen.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module._parameters.get("weight"), torch.Tensor):
            owners.setdefault(id(module.weight), []).append(name.removesuffix(".base_layer"))
    for tied in owners.values():
        for name in names:
            if name in tied and len(tied) > 1:
                other = next(each for each in tied if each != name)
                raise InputError(
                    f"module {name!r} shares its weight with {other!r}, so neither can be trained alone; leave it out"
                )


#: Under these names a batch comes into a model or into `generate`.
_BATCHES = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "attention_mask")


def _check_batch(names: list[str], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Raises:
        InputError: a batch is in the arguments, and it has not an example for every name.
    """
    for batch in (*args[:1], *(kwargs.get(name) for name in _BATCHES)):
        if isinstance(batch, torch.Tensor) and len(batch) != len(names):
            raise InputError(f"adapter_names has {len(names)} names for a batch of {len(batch)}; give one per example")


def _hand_over(
    adapter_names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": adapter_names}
