"""Two processes train to the weights that one does: DDP on both paths, FSDP2 on the side path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neft import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from tests.neft import two_processes
from tests.neft.helpers import State, differing, draw, state
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
PATHS = ("inplace", "side")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What each of two processes, started afresh over gloo, has to report."""
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", two_processes.__name__]
    done = subprocess.run(
        [sys.executable, *command, str(folder)], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    return first, second


@pytest.fixture(scope="module")
def alone() -> dict[str, State]:
    """The rows that one process trains on the whole batch, by path."""
    return {path: two_processes.train_alone(path) for path in PATHS}


def assert_trained_alike(actual: State, expected: State) -> None:
    """To rounding, where what was trained has moved by much more."""
    neurons = neurons_of(tiny_model())
    untrained = Overlay.read(tiny_model(), neurons).values
    assert actual.keys() == expected.keys() == untrained.keys()
    for name, rows in expected.items():
        assert (rows - untrained[name]).abs().max() > 1e-2, name
        torch.testing.assert_close(actual[name], rows, rtol=1e-4, atol=2e-5)


def neurons_of(model: Any) -> NeuronSet:
    return draw(NeuronSpace.from_model(model, two_processes.KINDS))


@pytest.mark.parametrize("path", PATHS)
def test_ddp_trains_as_one_process_on_the_whole_batch(path: str, found: Any, alone: dict[str, State]) -> None:
    first, second = (rank["ddp"][path] for rank in found)
    assert differing(first["rows"], second["rows"]) == []
    assert_trained_alike(first["rows"], alone[path])


@pytest.mark.parametrize("path", PATHS)
def test_ddp_reduces_the_gradients_of_the_rows_and_nothing_else(path: str, found: Any) -> None:
    parameters = neurons_of(tiny_model()).parameters
    for rank in found:
        assert rank["ddp"][path]["bytes"] == [4 * parameters] * two_processes.STEPS
    assert 4 * parameters < 4 * sum(p.numel() for p in tiny_model().parameters()) / 4


@pytest.mark.parametrize("path", PATHS)
def test_ddp_leaves_the_base_as_it_was(path: str, found: Any) -> None:
    for rank in found:
        assert differing(rank["ddp"][path]["base"], state(tiny_model())) == []


def test_fsdp_trains_as_one_process_on_the_whole_batch(found: Any, alone: dict[str, State]) -> None:
    first, second = (rank["fsdp"] for rank in found)
    assert differing(first["rows"], second["rows"]) == []
    assert_trained_alike(first["rows"], alone["side"])


def test_fsdp_shards_stay_as_they_were(found: Any) -> None:
    for rank in found:
        assert rank["fsdp"]["sharded"] > 0
        assert differing(rank["fsdp"]["before"], rank["fsdp"]["after"]) == []
    whole = [sum(t.numel() for t in rank["fsdp"]["before"].values()) for rank in found]
    assert sum(whole) == sum(parameter.numel() for parameter in tiny_model().parameters())


def test_fsdp_evaluates_mixes_and_adds_adapters(found: Any) -> None:
    for rank in found:
        torch.testing.assert_close(rank["fsdp"]["logits"], rank["fsdp"]["expected"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rank["fsdp"]["mixed"], rank["fsdp"]["expected_mixed"], rtol=1e-4, atol=1e-4)
        assert (rank["fsdp"]["logits"] - rank["fsdp"]["expected_mixed"]).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["forward", "forward without gradients", "generate", "sharded first", "root alone"])
def test_rows_are_not_written_into_sharded_weights(case: str, found: Any) -> None:
    for rank in found:
        assert "path='side'" in rank["refused"][case], rank["refused"][case]
