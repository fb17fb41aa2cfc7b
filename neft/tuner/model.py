"""NeftModel: puts NEFT layers into a model, and reads a task's overlay out of it."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from neft.errors import InputError
from neft.neurons import NeuronSet, Side
from neft.overlay import Overlay
from neft.tuner.config import NeftConfig
from neft.tuner.layer import NeftLinear


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
            target.update_layer(adapter_name, side, count, chosen)
            if adapter_name not in self.active_adapters:
                target.neft_rows[adapter_name].requires_grad_(False)
            return
        layer = NeftLinear(target, adapter_name, side, count, chosen)
        if adapter_name not in self.active_adapters:
            layer.neft_rows[adapter_name].requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            InputError: a module that the config names is not in the model.
        """
        config = cast(NeftConfig, self.peft_config[adapter_name])
        missing = sorted((config.rows.keys() | config.columns.keys()) - {name for name, _ in model.named_modules()})
        if missing:
            raise InputError(f"the model has no module {missing[0]!r}: the neurons belong to another model")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

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
            values[name] = layer.neft_rows[adapter_name].detach().to(layer.weight.dtype).cpu().clone()
        return Overlay(neurons, values)
