"""Examples as token ids: one encoding for scoring, training and evaluation, so that all see the same text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from neft.errors import InputError
from neft.tasks import Example

#: Label of a token that the loss leaves out, as transformers has it.
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and its completion; the completion starts at `start` and ends with the end token."""

    ids: tuple[int, ...]
    start: int

    @property
    def labels(self) -> list[int]:
        """Ids of the completion, `IGNORED` for the prompt."""
        return [IGNORED] * self.start + list(self.ids[self.start :])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides how text becomes token ids: vocabulary, rules, special tokens and chat template."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    described = [
        rules.to_str() if rules is not None else sorted(tokenizer.get_vocab().items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int | None = None, completion: str | None = None
) -> Encoded:
    """Tokenise prompt and completion together, the end token after them.

    A sequence longer than `max_length` loses the beginning of its prompt (but not a leading special token), so that
    the question that a template ends with stays; only a completion that is longer by itself is cut at its end.
    """
    text, special = _prompt_text(tokenizer, example)
    prompt = _ids(tokenizer, text, special)
    whole = _ids(tokenizer, text + (example.completion if completion is None else completion), special)
    start = 0
    while start < min(len(prompt), len(whole)) and prompt[start] == whole[start]:
        start += 1
    # A completion template may end with the end token itself.
    if tokenizer.eos_token_id is not None and whole[start:][-1:] != [tokenizer.eos_token_id]:
        whole = [*whole, tokenizer.eos_token_id]
    return _shortened(whole, start, max_length, tokenizer)


def encode_candidates(
    tokenizer: PreTrainedTokenizerBase, example: Example, completions: Sequence[str], max_length: int | None = None
) -> list[Encoded]:
    """Each completion after the example's prompt; the longest one decides how much of the prompt all of them keep."""
    encoded = [encode(tokenizer, example, completion=text) for text in completions]
    longest = max(len(item.ids) for item in encoded)
    return [_shortened(list(item.ids), item.start, max_length, tokenizer, longest) for item in encoded]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int | None = None) -> list[int]:
    """Token ids of the prompt alone, shortened from its beginning."""
    text, special = _prompt_text(tokenizer, example)
    ids = _ids(tokenizer, text, special)
    return list(_shortened(ids, len(ids), max_length, tokenizer).ids)


def _prompt_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[str, bool]:
    """The prompt as text, and whether the tokenizer is to add its special tokens (a chat template writes its own)."""
    if isinstance(example.prompt, str):
        return example.prompt, True
    if tokenizer.chat_template is None:
        raise InputError("the prompt is a list of messages, but the model has no chat template; write it as plain text")
    messages = [dict(message) for message in example.prompt]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return cast(str, text), False


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    # Some tokenizers end every text with the end token; it belongs after the completion.
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def _shortened(
    ids: list[int], start: int, max_length: int | None, tokenizer: PreTrainedTokenizerBase, longest: int | None = None
) -> Encoded:
    """The sequence with as much of its prompt dropped as one of `longest` tokens (default: its own) needs to fit."""
    longest = len(ids) if longest is None else longest
    if max_length is None or longest <= max_length:
        return Encoded(tuple(ids), start)
    lead = 1 if start and ids[0] in tokenizer.all_special_ids else 0
    dropped = min(longest - max_length, start - lead)
    kept = ids[:lead] + ids[lead + dropped :]
    return Encoded(tuple(kept[:max_length]), start - dropped)


Batch = Mapping[str, torch.Tensor]


def collate(encoded: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded int64 tensors `input_ids`, `attention_mask` and `labels`, each (batch, longest)."""
    longest = max(len(item.ids) for item in encoded)
    ids = torch.full((len(encoded), longest), pad_token_id)
    mask = torch.zeros((len(encoded), longest), dtype=torch.int64)
    labels = torch.full((len(encoded), longest), IGNORED)
    for row, item in enumerate(encoded):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        mask[row, : len(item.ids)] = 1
        labels[row, : len(item.ids)] = torch.tensor(item.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], size: int, max_length: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Collated batches of `size` examples, in order."""
    for start in range(0, len(examples), size):
        encoded = [encode(tokenizer, example, max_length) for example in examples[start : start + size]]
        yield collate(encoded, int(tokenizer.pad_token_id))
