"""The demo's real model and data, which `make demo-data` prepares; a few steps only, to fit two cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from flows.config import load_config
from neft.audit import Audit, state_digest
from neft.encoding import batches
from neft.evaluation import EvaluationSpec, evaluate
from neft.models import load_base
from neft.neurons import NeuronSpace
from neft.scoring import SCORERS
from neft.selection import Budget, select
from neft.tasks import Task, load_task
from neft.training import train
from neft.training_spec import TrainingSpec
from neft.tuner import NeftConfig
from tests.learnt import learn

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo.yaml"
SHORT = ("training.max_steps=3", "method.scoring_examples=8", "evaluation.general_tokens=128")


@pytest.fixture(scope="module", autouse=True)
def demo_data() -> None:
    if not (ROOT / ".neft" / "demo" / "manifest.json").exists():
        pytest.fail("the demo's model and data are missing: run `make demo-data` (`make test-slow` does)")


@pytest.fixture(scope="module")
def film() -> Task:
    """The first demo task; its hundred evaluation rows are half of either label."""
    return load_task(load_config(CONFIG).tasks[0])


def test_the_space_is_that_of_smollm2(film: Task) -> None:
    model, _ = load_base(str(ROOT / ".neft" / "demo" / "model"))
    space = NeuronSpace.from_model(model)
    assert (len(space.sites), len(space)) == (30, 30 * 1536)
    assert space.model_parameters == 134_515_008


def test_a_task_is_learnt_and_nothing_else_moves(film: Task) -> None:
    model, tokenizer = load_base(str(ROOT / ".neft" / "demo" / "model"))
    base = state_digest(model)
    space = NeuronSpace.from_model(model)
    scores = SCORERS["taylor"]().score(model, tokenizer, space, list(batches(tokenizer, film.train[:16], 8, 128)), 0)
    neurons = select(scores, Budget(neurons=0.1)).neurons
    audit = Audit(model, neurons)
    peft_model = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    losses: list[float] = []
    spec = TrainingSpec(max_steps=16, max_length=128, learning_rate=3e-4, logging_steps=4)
    train(
        peft_model,
        tokenizer,
        film,
        spec,
        0,
        lambda step, values: losses.append(values["loss"]) if "loss" in values else None,
    )
    assert losses[-1] < losses[0]
    overlay = peft_model.base_model.overlay(neurons)
    model = peft_model.unload()
    assert state_digest(model) == base
    before = overlay.lay_on(model)
    assert audit.compare(model).identical
    assert evaluate(model, tokenizer, film, EvaluationSpec(max_length=128)).value > (film.majority or 1) + 0.15
    before.lay_on(model)
    assert state_digest(model) == base


def test_the_demo_stream_runs_and_its_states_are_rebuilt(
    tmp_path: Path, prefect_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = [f"tasks.{place}.data.limit={{train: 24, eval: 8}}" for place in range(4)]
    learnt = learn(CONFIG, tmp_path, *SHORT, *limits)
    assert [len(row) for row in (learnt.run.matrix or {})["rows"]] == [4] * 5
    assert capsys.readouterr().err.count("other parameters bit-identical") == 4
    with learnt.registry() as registry:
        entry = registry.get("tweet-sentiment")
        model, tokenizer = registry.checkout(entry)
        assert state_digest(model) == entry.state_digest
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer("The film was", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
