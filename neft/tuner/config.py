"""NeftConfig: what PEFT saves and loads of the NEFT method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from peft.config import PeftConfig
from peft.utils import PeftType

from neft.errors import InputError, nearest
from neft.neurons import ModuleRows, NeuronSet
from neft.tuner.layer import Path


@dataclass
class NeftConfig(PeftConfig):
    """Configuration of NEFT: which rows and columns of which modules are trained, and nothing else.

    Build it from a neuron set with `NeftConfig.from_neurons`. As JSON it holds how many rows or columns each module
    trains, which is what PEFT needs to rebuild the layers; which ones they are is saved beside their values.
    """

    rows: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name -> number of trained rows (outputs) of its weight."}
    )
    columns: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name -> number of trained columns (inputs) of its weight."}
    )
    path: str = field(
        default="inplace",
        metadata={
            "help": "`inplace`: the rows live in the base weight, as fast as it is. `side`: the base weight is not "
            "touched and the change is added to its output, for weights that are quantised or sharded."
        },
    )
    space: str | None = field(
        default=None, metadata={"help": "Fingerprint of the neuron space that the neurons belong to."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the neurons, such as a classifier."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("NEFT")
        self.target_modules = set(self.rows) | set(self.columns)
        # Which rows and columns: known when built from a neuron set, read from the saved adapter otherwise.
        self.positions: dict[str, ModuleRows] = {}
        if self.path not in get_args(Path):
            raise InputError(f"NeftConfig: unknown path {self.path!r}; {nearest(self.path, get_args(Path))}")
        both = sorted(set(self.rows) & set(self.columns))
        if both:
            raise InputError(f"NeftConfig: module {both[0]!r} stands under both `rows` and `columns`; choose one")

    @classmethod
    def from_neurons(cls, neurons: NeuronSet, **options: Any) -> NeftConfig:
        """The configuration that trains exactly `neurons`; `options` are the other fields (`path`, `task_type`, ...).

        Raises:
            InputError: the set is empty.
        """
        chosen = neurons.rows()
        if not chosen:
            raise InputError("the neuron set is empty, so there is nothing to train; raise the budget")
        config = cls(
            rows={name: len(rows.positions) for name, rows in chosen.items() if rows.side == "row"},
            columns={name: len(rows.positions) for name, rows in chosen.items() if rows.side == "column"},
            space=neurons.space.fingerprint,
            **options,
        )
        config.positions = chosen
        return config
