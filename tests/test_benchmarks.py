"""The benchmarks run, what they measure is what they say, and the page is that of the files."""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import page, peers, training
from benchmarks import registry as registry_benchmark
from benchmarks.measure import RESULTS, ratios
from benchmarks.optimiser import AdamW
from neft.neurons import NeuronSpace
from registry import Registry
from tests.tiny import tiny_model

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
ROWS, TOKENS = 2, 24


def fresh() -> peers.LlamaForCausalLM:
    return peers.fresh_model(TINY, torch.device("cpu"), torch.float32)


def data() -> torch.Tensor:
    shape = (training.BATCHES, ROWS, TOKENS)
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def test_a_fresh_model_computes_and_a_twin_shares_its_memory() -> None:
    model = fresh()
    other = peers.twin(model)
    ids = data()[0]
    assert torch.isfinite(model(ids).logits).all()
    assert torch.equal(model(ids).logits, other(ids).logits)
    places = [{p.data_ptr() for p in each.parameters()} for each in (model, other)]
    assert places[0] == places[1]
    assert other.lm_head.weight is other.model.embed_tokens.weight


@pytest.mark.parametrize("name", list(peers.METHODS))
def test_every_method_takes_a_step_and_trains_what_it_says(name: str) -> None:
    learner = peers.METHODS[name](fresh())
    before = [parameter.detach().clone() for parameter in learner.trained]
    method = training.Training(learner, data(), autocast=False)
    method.step(0)
    method.step(training.BATCHES)
    changed = sum(int((old != new).sum()) for old, new in zip(before, learner.trained, strict=True))
    assert changed <= learner.parameters
    assert changed >= 0.8 * learner.parameters
    assert (method.described()["optimiser_bytes"] > 0) == bool(learner.trained)


def test_matched_methods_train_as_many_parameters() -> None:
    wanted = peers.METHODS["neft"](fresh()).parameters
    for name in ("gradient-mask", "lora-matched", "shira", "super-tuning", "neft-side", "neft-upper"):
        assert peers.METHODS[name](fresh()).parameters == pytest.approx(wanted, rel=0.15), name


def test_the_upper_half_is_kept_after_the_first_epoch() -> None:
    method = training.Training(peers.METHODS["neft-upper-cached"](fresh()), data(), autocast=False)
    for number in range(training.BATCHES):
        method.step(number)
    states = training.BATCHES * ROWS * TOKENS * TINY.hidden_size * 4
    assert method.described()["kept_states_bytes"] == states
    calls: list[object] = []
    lower = method.learner.model.base_model.model.model.layers[0].mlp
    lower.register_forward_hook(lambda *_: calls.append(None))
    method.step(0)
    assert calls == []


def test_bf16_weights_are_stepped_in_float32() -> None:
    model = tiny_model().to(torch.bfloat16).requires_grad_(True)
    reference = [parameter.detach().float().requires_grad_(True) for parameter in model.parameters()]
    ours = AdamW(list(model.parameters()), lr=1e-2)
    # PyTorch's default decay of 0.01 too: the benchmark's optimiser is PyTorch's own.
    theirs = torch.optim.AdamW(reference, lr=1e-2, fused=True)
    for _ in range(3):
        for parameter, other in zip(model.parameters(), reference, strict=True):
            other.data.copy_(parameter.data)
            parameter.grad = torch.ones_like(parameter)
            other.grad = torch.ones_like(other)
        ours.step()
        theirs.step()
        for parameter, other in zip(model.parameters(), reference, strict=True):
            assert torch.equal(parameter, other.to(torch.bfloat16))
    assert ours.state_bytes == sum(8 * parameter.numel() + 4 for parameter in model.parameters())


def test_ratios_are_taken_round_by_round() -> None:
    assert ratios([2.0, 30.0, 4.0], [1.0, 10.0, 2.0])["median"] == 2.0


def test_a_small_measurement_ends_in_figures() -> None:
    options = {"shape": "smollm2-135m", "device": "cpu", "batch": 1, "tokens": 32, "rounds": 2, "layers": 1}
    result = training.measure(argparse.Namespace(**options, methods=["full", "neft"]))
    assert list(result["methods"]) == ["full", "neft"]
    full, neft = result["methods"].values()
    assert full["peak_memory_bytes"] > neft["peak_memory_bytes"] > 2e8
    assert full["to_full"]["median"] == 1.0
    assert neft["to_full"]["median"] < 1.0
    assert neft["to_lora_matched"] is None


def test_the_page_is_made_of_the_files() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run `make docs`"
    assert any(RESULTS.glob("training-*.json"))


def test_tuner_and_benchmark_need_torch_transformers_and_peft_alone() -> None:
    program = """
import sys
import peft, transformers
absent = ("pydantic", "trl", "datasets", "prefect", "mlflow", "sqlalchemy", "typer", "matplotlib")
for name in absent:
    assert name not in sys.modules, name
    sys.modules[name] = None
import benchmarks.training, benchmarks.serving
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["imported"], done.stderr


def test_the_registrys_look_ups_are_measured_and_agree_with_a_plain_loop(tmp_path: Path) -> None:
    space = NeuronSpace.from_model(tiny_model())
    with closing(Registry.open(tmp_path)) as registry:
        registry_benchmark.fill(registry, space, 60)
        found = registry_benchmark.lookups(registry, space, 60)
        assert found["nearest_agrees"]
        assert 0 < found["by_alias"]["p50"] <= found["by_alias"]["p99"]
        assert found["nearest"]["median"] > 0
        assert registry_benchmark.database_bytes(registry, 60) > 1000


def test_sets_of_a_family_share_neurons_and_have_a_tenth_of_all() -> None:
    first, second, *_, stranger = registry_benchmark.made_up(10_000, registry_benchmark.FAMILY + 1)
    assert len(first) == len(second) == len(stranger) == 1000
    assert first.intersection_cardinality(second) > 350
    assert first.intersection_cardinality(stranger) < 200
