"""Scorers: each against a reference of its own, on every family; and what they leave behind: nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from neft.audit import state_digest
from neft.encoding import IGNORED
from neft.errors import FailedError, InputError
from neft.files import load_tensors, save_tensors
from neft.neurons import KINDS, NeuronSpace
from neft.scoring import SCORERS, Scorer, Scores
from neft.scoring.keystone import Keystone
from neft.scoring.similarity import Similarity
from tests.tiny import FAMILIES, batch, tiny_model, tiny_tokenizer

Batch = dict[str, torch.Tensor]
TOKENIZER = tiny_tokenizer()

#: One row per scorer, with options that make its effect visible on a tiny model.
ROWS: dict[str, Scorer] = {
    "taylor": SCORERS["taylor"](),
    "fisher": SCORERS["fisher"](),
    "activation": SCORERS["activation"](),
    "weight": SCORERS["weight"](),
    "similarity": Similarity(steps=3, learning_rate=1e-3),
    "keystone": Keystone(rho=0.1, new_tokens=4),
    "random": SCORERS["random"](),
}
#: Those that see activations through taps.
TAPPED = ("taylor", "fisher", "activation")
#: Similarity compares weights, which a few small steps hardly move in bfloat16.
LEAST_RANK_CORRELATION = {"similarity": 0.5}
#: Every scorer on every family; BERT writes no text, and so has no keystones.
PAIRS = [(family, name) for family in FAMILIES for name in ROWS if (family, name) != ("bert", "keystone")]


def data(model: PreTrainedModel, count: int = 2) -> list[Batch]:
    """Batches whose first tokens are a prompt, which the loss leaves out, and whose last row is padded."""
    batches = [batch(model, seed=seed) for seed in range(count)]
    for each in batches:
        each["labels"][:, :4] = IGNORED
    return batches


def space_of(model: PreTrainedModel, *kinds: str) -> NeuronSpace:
    return NeuronSpace.from_model(model, kinds or ("ffn",))


def assert_same(first: Scores, second: Scores, exact: bool = True) -> None:
    assert first.values.keys() == second.values.keys()
    for name, values in first.values.items():
        if exact:
            assert torch.equal(values, second.values[name]), name
        else:
            torch.testing.assert_close(values, second.values[name], rtol=1e-4, atol=1e-7, msg=name)


def summed_loss(model: PreTrainedModel, inputs: Batch) -> torch.Tensor:
    """Cross-entropy summed over the counted tokens, from the logits: next tokens in a causal model."""
    logits, labels = model(**inputs).logits, inputs["labels"]
    if model.config.model_type not in ("bert", "t5"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def seen(model: PreTrainedModel, space: NeuronSpace, inputs: Batch) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Site, activations and gradients (batch, tokens, neurons) of feed-forward sites, by plain autograd."""
    inner = {}

    def keep(name: str, x: torch.Tensor) -> None:
        x.retain_grad()
        inner[name] = x

    handles = [
        model.get_submodule(site.parts[-1].module).register_forward_pre_hook(
            lambda _, args, name=site.name: keep(name, args[0])
        )
        for site in space.sites
    ]
    summed_loss(model, inputs).backward()
    for handle in handles:
        handle.remove()
    for name, activation in inner.items():
        shape = (*inputs["input_ids"].shape, activation.shape[-1])
        yield name, activation.detach().reshape(shape), activation.grad.reshape(shape)


def mask_of(model: PreTrainedModel, site: str, inputs: Batch) -> torch.Tensor:
    """The real tokens that a site sees: the targets in a decoder that reads an encoder, else the inputs."""
    decoder = model.config.is_encoder_decoder and site.startswith("decoder")
    mask = inputs["labels"] != IGNORED if decoder else inputs["attention_mask"].bool()
    return mask[..., None]


# Against references


def test_every_scorer_has_a_row() -> None:
    assert ROWS.keys() == SCORERS.keys()
    assert all(isinstance(scorer, SCORERS[name]) and scorer.name == name for name, scorer in ROWS.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_tapped_scorers_equal_plain_autograd(family: str) -> None:
    model = tiny_model(family)
    space, batches = space_of(model), data(model)
    totals = {(name, site.name): torch.zeros(site.size) for name in TAPPED for site in space.sites}
    tokens = dict.fromkeys((site.name for site in space.sites), 0)
    for inputs in batches:
        for site, activation, gradient in seen(model, space, inputs):
            mask = mask_of(model, site, inputs)
            tokens[site] += int(mask.sum())
            totals["activation", site] += (activation.abs() * mask).sum((0, 1))
            totals["taylor", site] += ((activation * gradient).abs() * mask).sum((0, 1))
            totals["fisher", site] += (activation * gradient * mask).sum(1).square().sum(0)
    examples = sum(len(inputs["input_ids"]) for inputs in batches)
    for name in TAPPED:
        scores = ROWS[name].score(tiny_model(family), TOKENIZER, space, batches, seed=0)
        for site in tokens:
            expected = totals[name, site] / (examples if name == "fisher" else tokens[site])
            assert expected.max() > 0
            torch.testing.assert_close(scores.values[site], expected, rtol=1e-4, atol=1e-8, msg=f"{name} {site}")


def test_taylor_of_grouped_attention_sums_the_channels_that_share_a_value_row() -> None:
    model = tiny_model("llama")
    space, inputs = space_of(model, "attention"), data(model, 1)[0]
    layer = model.model.layers[0].self_attn.o_proj
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), kept.append(args[0]))[1])
    summed_loss(model, inputs).backward()
    handle.remove()
    effect = (kept[0] * kept[0].grad).detach().reshape(*inputs["input_ids"].shape, 2, 2, 8).sum(3).flatten(2)
    mask = inputs["attention_mask"][..., None]
    expected = (effect.abs() * mask).sum((0, 1)) / mask.sum()
    scores = ROWS["taylor"].score(tiny_model("llama"), TOKENIZER, space, [inputs], seed=0)
    torch.testing.assert_close(scores.values[space.sites[0].name], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_is_the_norm_of_the_neurons_rows_and_columns(family: str) -> None:
    model = tiny_model(family)
    space = space_of(model)
    values = ROWS["weight"].score(model, TOKENIZER, space, [], seed=0).values[space.sites[0].name]
    mlp = (model.model if family == "llama" else model.transformer).get_submodule(
        "layers.0.mlp" if family == "llama" else "h.0.mlp"
    )
    if family == "llama":
        whole = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1)
    else:
        whole = torch.cat([mlp.c_fc.weight.T, mlp.c_proj.weight], dim=1)
    torch.testing.assert_close(values, whole.detach().norm(dim=1))


def neuron_vectors(model: PreTrainedModel, layer: int) -> torch.Tensor:
    mlp = model.model.layers[layer].mlp
    rows = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    return torch.cat(rows, dim=1).detach().double()


def test_similarity_is_one_minus_the_cosine_after_full_fine_tuning() -> None:
    model = tiny_model("llama")
    batches, steps, rate = data(model), 3, 1e-3
    tuned = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        inputs = batches[step % len(batches)]
        counted = (inputs["labels"][:, 1:] != IGNORED).sum()
        (summed_loss(tuned, inputs) / counted).backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    scores = Similarity(steps=steps, learning_rate=rate).score(model, TOKENIZER, space_of(model), batches, seed=0)
    for layer, values in enumerate(scores.values.values()):
        expected = 1 - F.cosine_similarity(neuron_vectors(model, layer), neuron_vectors(tuned, layer))
        assert (values > 0).all()
        torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=1e-9)


def test_random_depends_on_the_seed_alone() -> None:
    model = tiny_model()
    space, scorer = space_of(model), ROWS["random"]
    first = scorer.score(model, TOKENIZER, space, [], seed=1)
    assert_same(first, scorer.score(tiny_model(seed=5), TOKENIZER, space, data(model), seed=1))
    values = torch.cat(list(first.values.values()))
    assert not torch.equal(values, torch.cat(list(scorer.score(model, TOKENIZER, space, [], seed=2).values.values())))
    assert (values >= 0).all()
    assert (values < 1).all()
    assert len(values.unique()) > 100


# On every family


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_scores_every_kind_on_every_family_and_leaves_the_model_as_it_was(family: str, name: str) -> None:
    model = tiny_model(family).train()
    space, batches = space_of(model, "ffn", "attention", "qk"), data(model)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    gradient = torch.ones_like(last := list(model.parameters())[-1])
    last.grad = gradient
    before = state_digest(model)
    scores = ROWS[name].score(model, TOKENIZER, space, batches, seed=0)

    assert scores.values.keys() == {site.name for site in space.sites}
    for site in space.sites:
        assert scores.values[site.name].dtype == torch.float32
        assert (scores.values[site.name] >= 0).all(), site.name
        assert scores.values[site.name].count_nonzero() > site.size / 4, site.name
    assert state_digest(model) == before
    assert model.training
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert last.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not last)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Dropout is off while scoring, so that a second look gives the same.
    assert_same(scores, ROWS[name].score(model, TOKENIZER, space, batches, seed=0))


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_padding_is_ignored(family: str, name: str) -> None:
    model = tiny_model(family)
    batches = data(model)
    padded = [
        {key: F.pad(tensor, (0, 3), value=IGNORED if key == "labels" else 0) for key, tensor in inputs.items()}
        for inputs in batches
    ]
    first, second = (ROWS[name].score(model, TOKENIZER, space_of(model), given, seed=0) for given in (batches, padded))
    assert_same(first, second, exact=False)


@pytest.mark.parametrize("name", TAPPED)
@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_an_encoders_input_and_a_decoders_target_may_differ_in_length(family: str, name: str) -> None:
    model = tiny_model(family)
    inputs = batch(model, tokens=10) | {"labels": batch(model, tokens=6)["labels"]}
    space = space_of(model, "ffn", "attention", "qk")
    padded = inputs | {"labels": F.pad(inputs["labels"], (0, 3), value=IGNORED)}
    first, second = (ROWS[name].score(model, TOKENIZER, space, [given], seed=0) for given in (inputs, padded))
    assert_same(first, second, exact=False)


@pytest.mark.parametrize("name", TAPPED)
def test_each_batch_counts_by_its_tokens_or_examples(name: str) -> None:
    model = tiny_model()
    space, batches = space_of(model), data(model, 2)
    together = {key: torch.cat([inputs[key] for inputs in batches]) for key in batches[0]}
    first, second = (ROWS[name].score(model, TOKENIZER, space, given, seed=0) for given in (batches, [together]))
    assert_same(first, second, exact=False)


@pytest.mark.parametrize("name", ["taylor", "fisher", "similarity"])
def test_tokens_that_the_loss_leaves_out_do_not_drive_the_gradient(name: str) -> None:
    """Prompt labels are -100; counting them changes the loss, and so the scores."""
    model = tiny_model()
    masked = data(model, 1)
    whole = [masked[0] | {"labels": batch(model, seed=0)["labels"]}]
    first, second = (ROWS[name].score(model, TOKENIZER, space_of(model), given, seed=0) for given in (masked, whole))
    assert any(not torch.allclose(first.values[site], second.values[site], rtol=1e-3) for site in first.values)


@pytest.mark.parametrize("name", ROWS)
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = tiny_model()
    space, batches = space_of(model, "ffn", "attention"), data(model)
    plain = ROWS[name].score(model, TOKENIZER, space, batches, seed=0)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(plain, ROWS[name].score(model, TOKENIZER, space, batches, seed=0))
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ROWS)
def test_scores_in_bfloat16_rank_neurons_as_those_in_float32(name: str) -> None:
    """Eight bits of mantissa blur a score, but sums over tokens are kept in float32."""
    batches = data(tiny_model())
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        scores.append(ROWS[name].score(model, TOKENIZER, space_of(model), batches, seed=0))
        assert all(parameter.dtype == dtype for parameter in model.parameters())
    for site, exact in scores[0].values.items():
        both = torch.stack([exact, scores[1].values[site]]).argsort(-1).argsort(-1).double()
        assert torch.corrcoef(both)[0, 1] > LEAST_RANK_CORRELATION.get(name, 0.95), site


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_neuron_is_scored(name: str, kind: str) -> None:
    model = tiny_model("qwen3")
    space = space_of(model, kind)
    scores = ROWS[name].score(model, TOKENIZER, space, data(model), seed=0)
    assert sum(len(values) for values in scores.values.values()) == len(space)
    assert all(values.std() > 0 for values in scores.values.values())


@pytest.mark.parametrize("name", ["taylor", "fisher", "activation", "similarity"])
def test_a_failing_forward_still_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny_model().train()
    before = state_digest(model)
    bad = data(model, 1)[0] | {"input_ids": torch.full((4, 10), 10_000)}
    with pytest.raises(IndexError):
        ROWS[name].score(model, TOKENIZER, space_of(model), [*data(model, 1), bad], seed=0)
    assert state_digest(model) == before
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Scores as values


@pytest.fixture
def scores() -> Scores:
    model = tiny_model()
    return ROWS["random"].score(model, TOKENIZER, space_of(model), [], seed=0)


def test_scores_are_saved_and_loaded(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.space == scores.space
    for name, values in scores.values.items():
        # To 11 bits; and what is 2^-25 of the site's largest may be 0.
        assert torch.allclose(loaded.values[name], values, rtol=2**-11, atol=float(values.abs().max()) * 2**-24)
    # What was read is written as it is.
    loaded.save(tmp_path / "again.safetensors")
    assert_same(Scores.load(tmp_path / "again.safetensors"), loaded)


def test_scores_are_kept_in_two_bytes_whatever_their_magnitude(tmp_path: Path) -> None:
    space = NeuronSpace.from_model(tiny_model())
    for factor in (1e-30, 1.0, 1e30, 0.0, -1e-9):
        values = {site.name: factor * torch.linspace(0.5, 1, site.size) for site in space.sites}
        Scores(space, values).save(tmp_path / "scores.safetensors")
        loaded = Scores.load(tmp_path / "scores.safetensors").values
        for name, expected in values.items():
            assert torch.allclose(loaded[name], expected, rtol=2**-11, atol=0)
    tensors, _ = load_tensors(tmp_path / "scores.safetensors", "neft-scores")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_scores_of_an_older_file_are_read_as_they_are(scores: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_tensors(path, "neft-scores", scores.values, {"space": scores.space.to_dict()})
    assert_same(Scores.load(path), scores)


def test_a_foreign_or_broken_file_is_refused(scores: Scores, tmp_path: Path) -> None:
    scores.space.all().save(tmp_path / "set.safetensors")
    with pytest.raises(InputError, match="not a 'neft-scores'"):
        Scores.load(tmp_path / "set.safetensors")
    scores.save(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-5])
    with pytest.raises(FailedError, match="is corrupt"):
        Scores.load(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="no such file"):
        Scores.load(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_scores_that_are_not_finite_are_refused(scores: Scores, wrong: float) -> None:
    values = {name: tensor.double() for name, tensor in scores.values.items()}
    last = list(values)[-1]
    values[last][3] = wrong
    with pytest.raises(FailedError, match=rf"{last}.*not finite.*model\.dtype"):
        Scores(scores.space, values)


def test_scores_of_another_shape_are_refused(scores: Scores) -> None:
    first = scores.space.sites[0].name
    with pytest.raises(InputError, match=r"must have shape \(64,\), not shape \(63,\)"):
        Scores(scores.space, {**scores.values, first: torch.zeros(63)})
    with pytest.raises(InputError, match=rf"{first}.*not none"):
        Scores(scores.space, {name: values for name, values in scores.values.items() if name != first})


def test_a_model_that_overflows_is_refused_by_a_clear_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(FailedError, match="not finite"):
        ROWS["taylor"].score(model, TOKENIZER, space_of(model), data(model), seed=0)
