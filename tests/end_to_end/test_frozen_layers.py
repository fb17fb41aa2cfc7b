"""A stream that trains the upper half of the layers, from hidden states that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from neft.forgetting import AccuracyMatrix
from tests.learnt import Learnt, learn

HALF = ("method.selection.lowest_layer=0.5", "method.budget=0.1")
KEPT = "training.cache_frozen_layers=true"
NAMES = ("colours", "animals", "places")


@pytest.fixture(scope="module")
def runs(stream: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> tuple[Learnt, Learnt]:
    """The stream learnt twice in one home: with hidden states kept, then without."""
    home = tmp_path_factory.mktemp("home")
    return learn(stream, home, *HALF, KEPT), learn(stream, home, *HALF)


def test_every_task_trains_neurons_of_the_upper_half_alone(runs: tuple[Learnt, Learnt]) -> None:
    with runs[0].registry() as registry:
        for name in NAMES:
            entry = registry.get(f"{name}@1")
            neurons = registry.neurons(entry)
            assert set(neurons.indices) == {"model.layers.1.ffn"}
            assert len(neurons) == 13  # a tenth of the 128 of both layers
            assert entry.audit["identical"] is True


def test_the_scores_are_those_of_training_without(runs: tuple[Learnt, Learnt]) -> None:
    kept, plain = (AccuracyMatrix.from_dict(learnt.run.matrix or {}).rows for learnt in runs)
    assert kept[0] != kept[-1]
    for first, second in zip(kept, plain, strict=True):
        assert first == pytest.approx(second, abs=1.5 / 24)  # rounding may tip one of the 24 rows


def test_keeping_states_is_another_work_with_the_same_outcome(runs: tuple[Learnt, Learnt]) -> None:
    """Rounding may differ, so what one run recorded is not the other's; nor are the runs one."""
    kept, plain = runs
    assert kept.run.id != plain.run.id
    with kept.registry() as registry:
        for name in NAMES:
            first, second = registry.get(f"{name}@1"), registry.get(f"{name}@2")
            assert first.input_digest != second.input_digest
            assert (first.training["cache_frozen_layers"], second.training["cache_frozen_layers"]) == (True, False)
            assert first.metrics["training_loss"] == pytest.approx(second.metrics["training_loss"], rel=1e-3)


def test_the_bytes_kept_are_shown(runs: tuple[Learnt, Learnt]) -> None:
    client = runs[0].mlflow
    shown = []
    for version in (1, 2):
        with runs[0].registry() as registry:
            run_id = registry.get(f"colours@{version}").mlflow_run_id
        shown.append(client.get_run(run_id).data.metrics.get("train/cached_bytes"))
        free = client.get_run(run_id).data.metrics["selection/free_before"]
        assert free == 64
    tokens = 64 * 8  # `Text:`, four words, `Kind:`, a label, the end
    assert shown == [tokens * 32 * 4, None]


def test_a_run_with_kept_states_is_not_done_again(runs: tuple[Learnt, Learnt], stream: Path) -> None:
    again = learn(stream, runs[0].home.path, *HALF, KEPT)
    with again.registry() as registry:
        assert {registry.get(name).version for name in NAMES} == {2}
