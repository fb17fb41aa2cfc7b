"""Evaluation: likelihoods against a naive computation without cache or padding, answers, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from neft import evaluation
from neft.encoding import encode, encode_prompt
from neft.errors import InputError
from neft.evaluation import (
    EvaluationSpec,
    Probe,
    completion_log_likelihoods,
    evaluate,
    generate,
    load_probes,
    perplexity,
)
from neft.tasks import Example, Task
from tests.tiny import ANIMALS, CAUSAL, COLOURS, FILLERS, merging_tokenizer, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORDS = [*COLOURS, *ANIMALS, *FILLERS]
#: One label is the prefix of another, two share their first token, and all are of different lengths.
LABELS = (" warm", " warm cold", " warm cold tame wild", " north")


def prompt(words: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + place) % len(WORDS)] for place in range(words))


def examples(*lengths: int, completion: str = " warm") -> list[Example]:
    return [Example(prompt(length, start), completion) for start, length in enumerate(lengths)]


@torch.no_grad()
def naive(model: PreTrainedModel, ids: Sequence[int], start: int) -> float:
    """Log-likelihood of the tokens from `start` on, from one pass over the whole sequence."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(logits[place - 1, ids[place]] for place in range(start, len(ids))))


def assert_equals_naive(
    model: PreTrainedModel,
    rows: Sequence[Example],
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
) -> None:
    found = completion_log_likelihoods(model, tokenizer, rows, labels)
    expected = []
    for row in rows:
        encoded = [encode(tokenizer, row, completion=label) for label in labels]
        # A label that melts with the prompt's end is compared from there on, and so are the others.
        start = min(item.start for item in encoded)
        expected.append([naive(model, item.ids, start) for item in encoded])
    assert found.shape == (len(rows), len(labels))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


# Classification


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize(
    "lengths", [(3, 8, 5), (1, 4, 1), (1, 1), (30, 2, 45), (20,)], ids=["ragged", "single", "no cache", "long", "one"]
)
def test_likelihoods_equal_a_naive_computation(family: str, lengths: tuple[int, ...]) -> None:
    """Prompts longer than Gemma 2's window of 16 among them, and prompts whose only token predicts the label."""
    assert_equals_naive(tiny_model(family), examples(*lengths), LABELS)


@pytest.mark.parametrize("labels", [(" warm", " cold"), (" warm", " warm cold"), (" north south", " north warm cold")])
def test_likelihoods_of_few_labels(labels: tuple[str, ...]) -> None:
    assert_equals_naive(tiny_model(), examples(6, 2, 9), labels)


def test_a_label_may_have_more_tokens_after_one_prompt_than_after_another() -> None:
    rows = [Example("bcb:", ""), Example("cb", ""), Example("c: :", "")]
    encoded = [encode(merging_tokenizer(), row, completion="ad") for row in rows]
    counts = {len(item.ids) - item.start for item in encoded}
    assert counts == {2, 3}
    assert_equals_naive(tiny_model(), rows, ("ad", "ab", "bad"), merging_tokenizer())


@pytest.mark.parametrize("family", CAUSAL)
def test_a_long_prompt_loses_its_beginning_for_all_labels_alike(family: str) -> None:
    model, limit = tiny_model(family), 10
    rows = examples(30, 2, 8)
    found = completion_log_likelihoods(model, TOKENIZER, rows, LABELS, limit)
    longest = max(len(TOKENIZER(label)["input_ids"]) for label in LABELS) + 1
    for row, likelihoods in zip(rows, found.tolist(), strict=True):
        kept = TOKENIZER(row.prompt)["input_ids"][-(limit - longest) :]
        for label, likelihood in zip(LABELS, likelihoods, strict=True):
            ids = [*kept, *TOKENIZER(label)["input_ids"], TOKENIZER.eos_token_id]
            assert likelihood == pytest.approx(naive(model, ids, len(kept)), abs=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_prompt_and_its_label_may_fill_all_positions_of_a_model(family: str) -> None:
    model = tiny_model(family)
    found = completion_log_likelihoods(model, TOKENIZER, examples(62, 5), (" warm", " cold"), 64)
    ids = [*TOKENIZER(prompt(62))["input_ids"], *TOKENIZER(" cold")["input_ids"], TOKENIZER.eos_token_id]
    assert len(ids) == 64 == model.config.max_position_embeddings
    assert float(found[0, 1]) == pytest.approx(naive(model, ids, 62), abs=1e-3)
    assert_equals_naive(model, examples(62, 5), (" warm", " cold"))


def classification(lengths: Sequence[int] = (3, 9, 1, 5, 2, 7, 4)) -> Task:
    rows = tuple(Example(row.prompt, LABELS[place % len(LABELS)]) for place, row in enumerate(examples(*lengths)))
    return Task("task", rows, rows, "accuracy", LABELS)


def test_accuracy_is_the_share_of_rows_whose_label_is_likeliest() -> None:
    model, task = tiny_model(), classification()
    right = 0
    for row in task.eval:
        encoded = [encode(TOKENIZER, row, completion=label) for label in LABELS]
        scores = [naive(model, item.ids, item.start) for item in encoded]
        right += LABELS[scores.index(max(scores))] == row.completion
    score = evaluate(model, TOKENIZER, task, EvaluationSpec())
    assert (score.metric, score.value, score.examples) == ("accuracy", right / 7, 7)
    assert 0 < score.value < 1


def test_values_stand_in_the_order_of_the_tasks_examples() -> None:
    model, task = tiny_model(), classification()
    likeliest = [int(completion_log_likelihoods(model, TOKENIZER, [row], LABELS).argmax()) for row in task.eval]
    expected = tuple(float(LABELS[best] == row.completion) for best, row in zip(likeliest, task.eval, strict=True))
    assert evaluate(model, TOKENIZER, task, EvaluationSpec(batch_size=2)).values == expected
    by_length = sorted(range(7), key=lambda number: len(str(task.eval[number].prompt)))
    assert expected != tuple(expected[number] for number in by_length)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_batch_size_does_not_change_accuracy(family: str) -> None:
    model = tiny_model(family)
    scores = {
        evaluate(model, TOKENIZER, classification(), EvaluationSpec(batch_size=size)).value for size in (1, 3, 16)
    }
    assert len(scores) == 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_without_dropout_and_leaves_mode_and_gradients_alone(training: bool) -> None:
    model = tiny_model("gpt2").train(training)  # GPT-2 drops out by default
    first, second = (evaluate(model, TOKENIZER, classification(), EvaluationSpec()) for _ in range(2))
    assert first == second
    assert model.training is training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("completions", [(" warm", " cold"), ()], ids=["labels", "generation"])
def test_a_prompt_without_tokens_is_refused(completions: tuple[str, ...]) -> None:
    rows = (Example("red", " warm"), Example("", " warm"))
    task = Task("task", rows, rows, "accuracy" if completions else "exact_match", completions)
    model = tiny_model().train()
    with pytest.raises(InputError, match=r"a prompt has no tokens.*prompt template"):
        evaluate(model, TOKENIZER, task, EvaluationSpec())
    assert model.training


def test_labels_that_leave_no_room_for_the_prompt_are_refused() -> None:
    with pytest.raises(InputError, match=r"raise evaluation\.max_length"):
        completion_log_likelihoods(tiny_model(), TOKENIZER, examples(5), LABELS, max_length=4)


# Generation


def bos_tokenizer() -> PreTrainedTokenizerFast:
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    written: list[int] = []
    while len(written) < count:
        written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        if written[-1] == TOKENIZER.eos_token_id:
            break
    return written


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("made", [TOKENIZER, bos_tokenizer()], ids=["plain", "bos"])
def test_answers_equal_greedy_decoding_one_by_one(family: str, made: PreTrainedTokenizerFast) -> None:
    model, rows = tiny_model(family), examples(2, 7, 1, 20)
    expected = [greedy(model, encode_prompt(made, row), 6) for row in rows]
    assert generate(model, made, rows, 6) == made.batch_decode(expected, skip_special_tokens=True)


def test_a_long_prompt_is_cut_at_its_beginning_for_generation() -> None:
    model, row = tiny_model(), examples(12)
    assert generate(model, TOKENIZER, row, 4, 5) == generate(model, TOKENIZER, [Example(prompt(5, 7), "")], 4)


ANSWERS = {
    "exact_match": [
        ("a cat", " a cat", 1.0),
        ("a  cat\n", " a cat", 1.0),
        ("A cat", " a cat", 0.0),
        ("a cat sat", " a cat", 0.0),
        ("", " a cat", 0.0),
    ],
    # F1 of the longest common subsequence: precision and recall 2/3 of "the cat"; 2/2 and 2/4 of "a c"; stemmed words.
    "rouge_l": [
        ("the cat sat", " the cat ran", 2 / 3),
        ("a c", " a b c d", 2 * 1.0 * 0.5 / 1.5),
        ("cats running", " cat run", 1.0),
        ("", " the cat", 0.0),
    ],
}


@pytest.mark.parametrize(("metric", "cases"), ANSWERS.items())
def test_answers_are_scored_by_the_metric(
    metric: str, cases: list[tuple[str, str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = iter(cases)
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, rows, *rest: [next(waiting)[0] for _ in rows])
    rows = tuple(Example("red", reference) for _, reference, _ in cases)
    score = evaluate(tiny_model(), TOKENIZER, Task("task", rows, rows, metric), EvaluationSpec(batch_size=2))
    assert score.metric == metric
    assert score.value == pytest.approx(sum(value for *_, value in cases) / len(cases))


def test_the_longest_answer_is_the_tasks() -> None:
    model = tiny_model()
    row = Example(prompt(3), "")
    reference = generate(model, TOKENIZER, [row], 3)[0]
    assert reference
    rows = (Example(row.prompt, f" {reference}"),)
    short, long = (
        evaluate(model, TOKENIZER, Task("task", rows, rows, "exact_match", max_new_tokens=count), EvaluationSpec())
        for count in (3, 6)
    )
    assert (short.value, long.value) == (1.0, 0.0)


# Perplexity


def direct(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> float:
    likelihoods = [naive(model, window, 1) for window in windows]
    return math.exp(-sum(likelihoods) / sum(len(window) - 1 for window in windows))


@pytest.mark.parametrize("family", CAUSAL)
def test_perplexity_equals_a_direct_computation(family: str) -> None:
    model, text = tiny_model(family), prompt(20)
    expected = direct(model, [TOKENIZER(text)["input_ids"]])
    assert perplexity(model, TOKENIZER, Probe("probe", text, 100)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "tokens", "window", "cuts"),
    [
        (25, 100, 10, [(0, 10), (10, 20), (20, 25)]),
        (21, 100, 10, [(0, 10), (10, 20)]),  # nothing predicts a window's only token
        (25, 12, 10, [(0, 10), (10, 12)]),
        (100, 100, 512, [(0, 64), (64, 100)]),  # the model has 64 positions
        (2, 100, 10, [(0, 2)]),
    ],
)
def test_perplexity_reads_windows_that_do_not_overlap(
    words: int, tokens: int, window: int, cuts: list[tuple[int, int]]
) -> None:
    model, text = tiny_model("gpt2").train(), prompt(words)
    found = perplexity(model, TOKENIZER, Probe("probe", text, tokens), window)
    assert model.training
    ids = TOKENIZER(text)["input_ids"]
    assert found == pytest.approx(direct(model.eval(), [ids[start:end] for start, end in cuts]), rel=1e-4)


def test_perplexity_needs_two_tokens() -> None:
    with pytest.raises(InputError, match="probe has fewer than two tokens"):
        perplexity(tiny_model(), TOKENIZER, Probe("probe", "red", 100))


def test_probes_are_read_and_known_by_their_text_and_length(tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_text(" the red cat\n", encoding="utf-8")
    spec = EvaluationSpec(general=(tmp_path / "news.txt",), general_tokens=7)
    (probe,) = load_probes(spec)
    assert probe == Probe("news", "the red cat", 7)
    prints = {Probe(*each).fingerprint for each in (("a", "x", 7), ("b", "x", 7), ("a", "y", 7), ("a", "x", 8))}
    assert len(prints) == 3
    assert load_probes(EvaluationSpec()) == ()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"gone.txt": None}, "no such file"),
        ({"blank.txt": b" \n"}, "is empty; give a text file"),
        ({"latin.txt": "ä".encode("latin-1")}, "is not UTF-8 text"),
        ({"one/news.txt": b"a b", "two/news.txt": b"c d"}, "two files are called 'news'; rename one"),
    ],
)
def test_a_bad_probe_is_named(tmp_path: Path, files: dict[str, bytes | None], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"evaluation.general: .*{words}"):
        load_probes(EvaluationSpec(general=tuple(tmp_path / name for name in files)))
