"""neft: neuron-level fine-tuning. Score a model's neurons, choose a few, train them alone, lay them on, take them off.

Importing the package registers the PEFT method `NEFT`. The names below are loaded when they are first used, so that
importing neft costs nothing to a program that does not train.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from neft.registration import register_with_peft

if TYPE_CHECKING:
    from neft.errors import FailedError, InputError, NeftError
    from neft.forgetting import AccuracyMatrix
    from neft.neurons import NeuronSet, NeuronSpace
    from neft.overlay import Overlay
    from neft.scoring import Scores
    from neft.selection import Budget, SelectionSpec, select
    from neft.tuner import NeftConfig, NeftModel

__version__ = "0.1.0"

_HOMES = {
    "AccuracyMatrix": "neft.forgetting",
    "Budget": "neft.selection",
    "FailedError": "neft.errors",
    "InputError": "neft.errors",
    "NeftConfig": "neft.tuner",
    "NeftError": "neft.errors",
    "NeftModel": "neft.tuner",
    "NeuronSet": "neft.neurons",
    "NeuronSpace": "neft.neurons",
    "Overlay": "neft.overlay",
    "Scores": "neft.scoring",
    "SelectionSpec": "neft.selection",
    "select": "neft.selection",
}

__all__ = [
    "AccuracyMatrix",
    "Budget",
    "FailedError",
    "InputError",
    "NeftConfig",
    "NeftError",
    "NeftModel",
    "NeuronSet",
    "NeuronSpace",
    "Overlay",
    "Scores",
    "SelectionSpec",
    "__version__",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_peft()
