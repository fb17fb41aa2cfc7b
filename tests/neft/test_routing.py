"""Routing: features of the lowest layers alone, signatures that tell tasks apart, and what is near no task."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from neft.encoding import encode_prompt
from neft.errors import FailedError, InputError
from neft.routing import Router, Signature, features, layers_of
from neft.tasks import Example
from tests.tiny import ANIMALS, CAUSAL, COLOURS, FILLERS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model()


def prompts(words: tuple[str, ...], question: str, count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(words, k=draw.randint(3, 8))) for _ in range(count)]
    return [Example(f"Text: {text} {question}", "") for text in texts]


#: Two questions about the same texts, and the same question about other texts.
KINDS = {
    "colours": (COLOURS, "Kind: red"),
    "colours, asked otherwise": (COLOURS, "one owl"),
    "animals": (ANIMALS, "Kind: red"),
}


@pytest.fixture(scope="module")
def router() -> Router:
    return Router({name: Signature.of(MODEL, TOKENIZER, prompts(*kind, 96)) for name, kind in KINDS.items()})


@pytest.mark.parametrize("family", CAUSAL)
def test_features_are_those_of_the_layers_below_and_no_other_layer_runs(family: str) -> None:
    model = tiny_model(family)
    example = prompts(COLOURS, "Kind:", 1)[0]
    ids = torch.tensor([encode_prompt(TOKENIZER, example)])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]
    scaled = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    later = []
    layers_of(model)[1].register_forward_hook(lambda *_: later.append(1))
    found = features(model, TOKENIZER, [example], depth=1)
    torch.testing.assert_close(found[0], torch.cat([scaled.mean(0), scaled[-1]]), rtol=1e-4, atol=1e-5)
    assert later == []
    model(input_ids=ids)
    assert later == [1]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_neither_batch_nor_padding_nor_order_changes_features(family: str) -> None:
    model, rows = tiny_model(family), prompts(COLOURS + FILLERS, "Kind:", 7)
    together = features(model, TOKENIZER, rows, depth=2, batch_size=7)
    alone = torch.cat([features(model, TOKENIZER, [row], depth=2) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in alone}) == 7


def test_a_model_is_left_in_its_mode_and_reads_no_more_than_the_length() -> None:
    model = tiny_model().train()
    row = prompts(COLOURS, "Kind:", 1)[0]
    short = features(model, TOKENIZER, [row], depth=1, max_length=2)
    assert model.training and not layers_of(model)[0]._forward_hooks
    last = Example(" ".join(str(row.prompt).split()[-2:]), "")
    torch.testing.assert_close(short, features(model, TOKENIZER, [last], depth=1))


def test_a_prompt_without_tokens_and_a_model_without_one_stack_are_refused() -> None:
    with pytest.raises(InputError, match="a prompt has no tokens"):
        features(MODEL, TOKENIZER, [Example("", "")], depth=1)
    with pytest.raises(InputError, match="T5ForConditionalGeneration has not one stack of layers"):
        layers_of(tiny_model("t5"))


def test_likelihood_is_that_of_scikit_learn() -> None:
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(64, 6, generator=draw) * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    signature = Signature.fit(found, 1, None)
    fitted = found[:48].double().numpy()
    pca = PCA(len(signature.variances), svd_solver="full").fit(fitted)
    pca.noise_variance_ = signature.noise
    pca.explained_variance_ = np.maximum(pca.explained_variance_, signature.noise)
    assert len(signature.variances) == 5
    expected = pca.score_samples(found.double().numpy()) + 6 / 2 * math.log(2 * math.pi)
    assert signature.log_likelihood(found).numpy() == pytest.approx(expected, rel=1e-4)


def test_the_noise_is_measured_on_prompts_that_were_not_fitted_to() -> None:
    # In 200 dimensions 48 prompts are fitted nearly perfectly; the variance in each direction is 1 all the same.
    found = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    assert Signature.fit(found, 1, None).noise == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("name", KINDS)
def test_texts_and_questions_are_both_told_apart(router: Router, name: str) -> None:
    names = router.route(MODEL, TOKENIZER, prompts(*KINDS[name], 40, seed=1))
    assert names.count(name) >= 36
    assert set(names) <= {name, None}


def test_a_request_near_no_task_has_none(router: Router) -> None:
    strange = ["fox fox fox fox", "the", "Kind: Kind: Kind: Text:"]
    assert router.route(MODEL, TOKENIZER, strange) == [None] * 3
    own = str(prompts(*KINDS["animals"], 1, seed=2)[0].prompt)
    assert router.route(MODEL, TOKENIZER, [strange[0], own]) == [None, "animals"]


def test_the_likeliest_task_wins_among_those_that_are_near() -> None:
    plain = Signature(torch.zeros(2), torch.tensor([[1.0, 0.0]]), torch.ones(1), 1.0, -2.0, 1, None)
    other = replace(plain, mean=torch.tensor([4.0, 0.0]), near=-1.0)
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.9, 0.0], [2.1, 0.0], [9.0, 0.0]])
    # Log-likelihoods are minus half the squared distance: 2.1 lies nearer to the other one, but is not near it.
    assert Router({"plain": plain, "other": other}).nearest(points) == ["plain", "other", "plain", None, None]


def test_a_signature_is_small_the_same_again_and_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = prompts(COLOURS, "Kind:", 200)
    signature = Signature.of(MODEL, TOKENIZER, rows, 12, seed=3)
    again = Signature.of(MODEL, TOKENIZER, rows, 12, seed=3)
    other = Signature.of(MODEL, TOKENIZER, rows, 12, seed=4)
    signature.save(tmp_path / "one")
    again.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert not torch.equal(signature.mean, other.mean)
    assert signature.bytes == 4 * (64 + 8 * 64 + 8)
    back = Signature.load(tmp_path / "one")
    assert (back.depth, back.max_length, back.near, back.noise) == (1, 12, signature.near, signature.noise)
    found = signature.read(MODEL, TOKENIZER, rows[:5])
    assert torch.equal(back.log_likelihood(found), signature.log_likelihood(found))
    (tmp_path / "one").write_bytes((tmp_path / "one").read_bytes()[:-1])
    with pytest.raises(FailedError, match="corrupt"):
        Signature.load(tmp_path / "one")


@pytest.mark.parametrize("count", [1, 2, 8])
def test_few_prompts_or_equal_ones_have_a_signature_that_only_they_are_near(count: int) -> None:
    rows = prompts(("red",), "Kind:", 1) * 8 if count == 8 else prompts(COLOURS, "Kind:", count)
    router = Router({"few": Signature.of(MODEL, TOKENIZER, rows)})
    assert "few" in router.route(MODEL, TOKENIZER, rows)
    assert router.route(MODEL, TOKENIZER, ["fox owl fox"]) == [None]


def test_signatures_made_in_different_ways_are_refused(router: Router) -> None:
    signature = router.signatures["animals"]
    with pytest.raises(InputError, match="made alike, of one base model; given: a, b"):
        Router({"a": signature, "b": replace(signature, depth=2)})
    with pytest.raises(InputError, match="given: none"):
        Router({})
