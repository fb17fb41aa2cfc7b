"""Tiny random models of every family, a tiny tokenizer, and a tiny stream whose tasks can be learnt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from neft.tasks import Example

COLOURS = ("red", "green", "blue", "black", "white", "brown")
ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")
FILLERS = ("the", "a", "one", "some", "old", "new", "big", "odd")
LABELS = ("warm", "cold", "tame", "wild", "north", "south")
WORDS = ("<pad>", "<s>", "</s>", "<unk>", "Text:", "Kind:", *COLOURS, *ANIMALS, *FILLERS, *LABELS)

_SIZE = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that random features tell words apart, so that tiny tasks can be learnt.
    "initializer_range": 0.2,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_T5 = {"vocab_size": len(WORDS), "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
_T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}

#: Family -> a maker of its tiny random model.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GROUPED, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, head_dim=8, sliding_window=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_embd=32,
            n_inner=64,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZE)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **{key: value for key, value in _SIZE.items() if key != "intermediate_size"},
            ffn_dim=64,
            word_embed_proj_dim=32,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**_SIZE)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5_gated": lambda: T5ForConditionalGeneration(T5Config(**_T5, feed_forward_proj="gated-gelu")),
}

#: Families whose model continues a text, which a stream can learn.
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "gpt_neox", "opt")


def tiny_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model of 2 layers, width 32 and 64 feed-forward neurons a layer, in evaluation mode."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words above, one token each."""
    inner = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_tiny(folder: Path) -> Path:
    """The tiny Llama with its tokenizer, in a folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def texts_of(words: Sequence[str], count: int = 40) -> list[Example]:
    """Prompts of some of the words among filler words, as a task would have them."""
    draw = random.Random(0)
    return [Example(" ".join([*draw.choices(words, k=3), draw.choice(FILLERS)]), "") for _ in range(count)]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, with `:a` and `:ad` merged to one token, so that a prompt's end can melt into its completion."""
    vocabulary = {character: place for place, character in enumerate("abcd: ", 4)} | {"<pad>": 0, "</s>": 2}
    merges = [(":", "a"), (":a", "d")]
    vocabulary |= {"".join(pair): len(WORDS) - 1 - place for place, pair in enumerate(merges)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocabulary, merges)), pad_token="<pad>", eos_token="</s>"
    )


def batch(model: PreTrainedModel, rows: int = 4, tokens: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids with labels; the last row is padded by three tokens on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, len(WORDS), (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    ids[-1, -3:], mask[-1, -3:], labels[-1, -3:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _rows(topic: tuple[str, ...], labels: tuple[str, str], count: int, seed: int) -> list[dict[str, str]]:
    """A text of filler words around one word of the topic, which decides the label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        side = number % 2
        word = draw.choice(topic[side * 3 : side * 3 + 3])
        words = [*draw.choices(FILLERS, k=3), word]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": labels[side]})
    return rows


#: Tasks of the tiny stream: name, words that decide, labels.
TASKS = (
    ("colours", COLOURS, ("warm", "cold")),
    ("animals", ANIMALS, ("tame", "wild")),
    ("places", COLOURS[::-1], ("north", "south")),
)

#: Prompts of three capabilities in the words above, of unlike lengths.
KEYSTONE_PROMPTS = {
    "colours": ["red green the blue Kind:", "Text: black"],
    "animals": ["one old cat", "dog"],
    "fillers": ["the a one some"],
}


def write_stream(folder: Path, tasks: int = 3, **changes: Any) -> Path:
    """Write a tiny model, data and config to `folder`; returns the config's path. `changes` replace top-level keys."""
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    specs = []
    for place, (name, topic, labels) in enumerate(TASKS[:tasks]):
        for part, count in (("train", 64), ("eval", 24)):
            path = folder / f"{name}-{part}.jsonl"
            rows = _rows(topic, labels, count, seed=10 * place + (part == "eval"))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        specs.append(
            {
                "name": name,
                "data": {"files": {"train": f"{name}-train.jsonl", "eval": f"{name}-eval.jsonl"}},
                "prompt": "Text: {text} Kind:",
                "completion": " {label}",
                "labels": list(labels),
            }
        )
    (folder / "general.txt").write_text(" ".join(FILLERS * 8))
    config = {
        "stream": "tiny",
        "model": {"name": "./model"},
        "tasks": specs,
        "method": {"budget": 0.25},
        "training": {"max_steps": 40, "learning_rate": 0.02, "max_length": 16, "per_device_train_batch_size": 8},
        "evaluation": {"general": ["general.txt"]},
    }
    config |= changes
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
