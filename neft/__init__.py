"""neft: neuron-level fine-tuning. Score a model's neurons, choose a few, train them alone, lay them on and take them off.

Importing the package registers the PEFT method `NEFT`.
"""

from neft.errors import FailedError, InputError, NeftError
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.tuner import NeftConfig, NeftModel

__version__ = "0.1.0"

__all__ = [
    "FailedError",
    "InputError",
    "NeftConfig",
    "NeftError",
    "NeftModel",
    "NeuronSet",
    "NeuronSpace",
    "Overlay",
    "__version__",
]
