"""What importing neft loads, that PEFT knows NEFT in whichever order the two come, and who may import whom."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIGHT = """
import sys
import neft
loaded = {"mlflow", "prefect", "trl", "torch", "transformers", "peft"} & set(sys.modules)
assert not loaded, loaded
"""
ALL_OF_NEFT = """
import pkgutil, importlib, sys
import neft
for module in pkgutil.walk_packages(neft.__path__, "neft."):
    if module.name not in ("neft.training", "neft.transfer"):
        importlib.import_module(module.name)
loaded = {"mlflow", "prefect", "trl"} & set(sys.modules)
assert not loaded, loaded
"""
REGISTERED = """
import peft
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType
assert PeftType("NEFT") is PeftType.NEFT is PeftType["NEFT"]
assert PeftType.NEFT in list(PeftType) and PeftType.NEFT == "NEFT"
assert len({member.value for member in PeftType}) == len(list(PeftType))
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.NEFT] is neft.NeftConfig
assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.NEFT] is neft.NeftModel
assert peft.__spec__.loader.__class__.__module__ != "neft.registration"
assert not any(type(finder).__module__ == "neft.registration" for finder in sys.meta_path)
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "program",
    [
        LIGHT + REGISTERED,
        "import sys, peft\nimport neft\n" + REGISTERED,
        ALL_OF_NEFT,
    ],
    ids=["neft first, which loads nothing heavy", "peft first", "all of neft but what trains"],
)
def test_in_a_fresh_process(program: str) -> None:
    run(program)


def test_importing_twice_registers_once() -> None:
    import peft
    from peft.utils import PeftType

    import neft.registration

    before = list(PeftType)
    neft.registration.register_with_peft()
    assert list(PeftType) == before
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("NEFT")].__name__ == "NeftConfig"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import neft

    with pytest.raises(AttributeError, match="has no attribute 'Neuron'"):
        neft.Neuron  # noqa: B018
    assert all(getattr(neft, name) is not None for name in neft.__all__)


def test_the_contracts_between_the_packages_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kept, 0 broken" in done.stdout
