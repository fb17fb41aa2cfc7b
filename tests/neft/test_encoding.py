"""Encoding: what the model reads, and which of it the loss counts."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from neft.encoding import IGNORED, batches, collate, encode, encode_candidates, encode_prompt
from neft.errors import InputError
from neft.tasks import Example
from tests.tiny import merging_tokenizer, tiny_tokenizer

PAD, BOS, EOS, TEXT, KIND, RED, CAT, THE, WARM, COLD = 0, 1, 2, 4, 5, 6, 12, 18, 26, 27
EXAMPLE = Example("Text: the red cat Kind:", " warm")
CHAT = (
    "{% for message in messages %}<s> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}Kind:{% endif %}"
)


def tokenizer(single: str = "$A", eos: bool = True) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with special tokens around each text, as `single` says."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    if not eos:
        made.eos_token = None
    return made


def test_the_loss_counts_exactly_the_completion_and_the_end_token() -> None:
    encoded = encode(tokenizer(), EXAMPLE)
    assert encoded.ids == (TEXT, THE, RED, CAT, KIND, WARM, EOS)
    assert encoded.labels == [IGNORED] * 5 + [WARM, EOS]


def test_another_completion_stands_in_for_the_examples_own() -> None:
    assert encode(tokenizer(), EXAMPLE, completion=" cold").labels[-2:] == [COLD, EOS]


@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_there_is_one_end_token_whatever_the_tokenizer_adds(single: str) -> None:
    ids = encode(tokenizer(single), EXAMPLE).ids
    assert ids.count(EOS) == 1
    assert ids[-1] == EOS
    assert ids.count(BOS) == ids[:1].count(BOS) == single.count("<s>")
    assert EOS not in encode_prompt(tokenizer(single), EXAMPLE)


@pytest.mark.parametrize("single", ["$A", "$A </s>"])
def test_a_completion_that_ends_with_the_end_token_does_not_get_another(single: str) -> None:
    encoded = encode(tokenizer(single), Example("Text: red Kind:", " warm </s>"))
    assert encoded.ids[encoded.start :] == (WARM, EOS)


def test_a_tokenizer_without_an_end_token_adds_none() -> None:
    assert encode(tokenizer(eos=False), EXAMPLE).labels[-2:] == [IGNORED, WARM]


def test_a_token_that_melts_prompt_and_completion_belongs_to_the_completion() -> None:
    encoded = encode(merging_tokenizer(), Example("b:", "ac"))
    words = merging_tokenizer().convert_ids_to_tokens(list(encoded.ids))
    assert words == ["b", ":a", "c", "</s>"]
    assert encoded.start == 1


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (7, (TEXT, THE, RED, CAT, KIND, WARM, EOS)),
        (5, (RED, CAT, KIND, WARM, EOS)),
        (2, (WARM, EOS)),
        (1, (WARM,)),
    ],
)
def test_truncation_takes_the_prompts_beginning_first(length: int, expected: tuple[int, ...]) -> None:
    encoded = encode(tokenizer(), EXAMPLE, length)
    assert encoded.ids == expected
    assert encoded.start == max(0, length - 2)
    assert [label for label in encoded.labels if label != IGNORED] == list(expected[encoded.start :])


def test_truncation_keeps_a_leading_special_token() -> None:
    encoded = encode(tokenizer("<s> $A"), EXAMPLE, 5)
    assert encoded.ids == (BOS, CAT, KIND, WARM, EOS)
    assert encoded.start == 3
    assert encode_prompt(tokenizer("<s> $A"), EXAMPLE, 3) == [BOS, CAT, KIND]


def test_a_completion_longer_than_the_limit_is_cut_at_its_end() -> None:
    encoded = encode(tokenizer("<s> $A"), Example("Text: red", " warm cold warm cold"), 3)
    assert encoded.ids == (BOS, WARM, COLD)
    assert encoded.labels == [IGNORED, WARM, COLD]


def test_the_prompt_alone_is_the_beginning_of_the_whole() -> None:
    encoded = encode(tokenizer("<s> $A"), EXAMPLE)
    assert tuple(encode_prompt(tokenizer("<s> $A"), EXAMPLE)) == encoded.ids[: encoded.start]


def test_messages_go_through_the_chat_template_and_get_no_special_tokens_besides_its_own() -> None:
    made = tokenizer("<s> $A")
    made.chat_template = CHAT
    encoded = encode(made, Example(({"role": "user", "content": "the red"},), " warm"))
    assert encoded.ids == (BOS, THE, RED, EOS, KIND, WARM, EOS)
    assert encoded.labels == [IGNORED] * 5 + [WARM, EOS]


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(InputError, match="no chat template; write it as plain text"):
        encode(tokenizer(), Example(({"role": "user", "content": "red"},), " warm"))


def test_collating_pads_on_the_right_and_masks_the_padding() -> None:
    rows = [encode(tokenizer(), EXAMPLE), encode(tokenizer(), Example("Kind:", " cold"))]
    batch = collate(rows, PAD)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].tolist() == [[TEXT, THE, RED, CAT, KIND, WARM, EOS], [KIND, COLD, EOS, *[PAD] * 4]]
    assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED] * 5 + [WARM, EOS], [IGNORED, COLD, EOS] + [IGNORED] * 4]


def test_batches_are_of_the_asked_size_and_in_order() -> None:
    examples = [Example(f"Text: {word}", " warm") for word in ("red", "green", "blue", "black", "white")]
    sizes = [len(batch["input_ids"]) for batch in batches(tokenizer(), examples, 2)]
    second = [row[1] for batch in batches(tokenizer(), examples, 2, 4) for row in batch["input_ids"].tolist()]
    assert sizes == [2, 2, 1]
    assert second == [6, 7, 8, 9, 10]


def test_candidates_keep_the_same_end_of_the_prompt_whatever_their_length() -> None:
    made = tokenizer("<s> $A")
    short, long = encode_candidates(made, EXAMPLE, [" warm", " cold cold cold"], 7)
    assert short.ids == (BOS, CAT, KIND, WARM, EOS)
    assert long.ids == (BOS, CAT, KIND, COLD, COLD, COLD, EOS)
    assert short.start == long.start == 3
    assert encode_candidates(made, EXAMPLE, [" warm", " cold cold cold"]) == [
        encode(made, EXAMPLE, completion=text) for text in (" warm", " cold cold cold")
    ]
