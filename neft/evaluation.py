"""Evaluation: a model's score on a task, and its perplexity on text that belongs to no task."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from neft.encoding import Encoded, encode_candidates, encode_prompt
from neft.errors import InputError
from neft.modes import in_evaluation
from neft.tasks import Example, Spec, Task

#: Which state of a stream answers a task's prompts: the newest one; the one right after the task was learnt, since the
#: task is named; or the one of the task that the prompt is nearest to.
Mode = Literal["consolidated", "oracle", "routed"]


class EvaluationSpec(Spec):
    """How models are evaluated."""

    modes: tuple[Mode, ...] = Field(
        ("consolidated",),
        description="which state answers: `consolidated`, the newest; `oracle`, that of the task, which is named; "
        "`routed`, that of the nearest task. The last two are for streams that record entries, not for baselines",
    )
    batch_size: int = Field(16, gt=0, description="prompts evaluated at a time")
    max_length: int | None = Field(
        None,
        gt=1,
        description="tokens of prompt and answer; the beginning of a longer prompt is cut; default: training's",
    )
    general: tuple[Path, ...] = Field(
        (), description="held-out text files of no task, for the general probe (perplexity)"
    )
    general_tokens: int = Field(4096, gt=1, description="tokens read of each general text file")
    harness: tuple[str, ...] = Field(
        (), description="tasks of the LM Evaluation Harness, for the general probe (accuracy); needs `neft[lm-eval]`"
    )
    harness_limit: int | None = Field(None, gt=0, description="questions asked of each harness task; default: all")
    harness_include: Path | None = Field(None, description="folder of harness tasks of your own, as YAML")

    @field_validator("modes")
    @classmethod
    def _with_the_newest(cls, modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
        if "consolidated" not in modes or len(set(modes)) < len(modes):
            raise ValueError("name `consolidated`, which is always measured, and each other mode once at most")
        return modes


@dataclass(frozen=True)
class Score:
    """A model's score on one task under `metric`: one value in [0, 1] for each example, in the task's own order."""

    metric: str
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """Their mean."""
        return sum(self.values) / len(self.values)

    @property
    def examples(self) -> int:
        return len(self.values)


def evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, spec: EvaluationSpec) -> Score:
    """Score `model` on a task's evaluation data, in evaluation mode; the model is left as it was.

    Classification takes the label whose whole completion, end token included, has the highest log-likelihood;
    generation decodes greedily and is scored by exact match or ROUGE-L F1.
    """
    with in_evaluation(model), torch.inference_mode():
        scored = _classified if task.completions else _generated
        results = scored(model, tokenizer, task, spec)
        values = dict(tqdm(results, desc=f"evaluating {task.name}", total=len(task.eval), leave=False, disable=None))
    return Score(task.metric, tuple(values[number] for number in range(len(task.eval))))


def like_lengths(examples: Sequence[Example], size: int) -> Iterator[Sequence[int]]:
    """Numbers of the examples in batches of prompts of like length, since padding costs as much as text."""
    ordered = sorted(range(len(examples)), key=lambda number: len(str(examples[number].prompt)))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _classified(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, spec: EvaluationSpec
) -> Iterator[tuple[int, float]]:
    """Number and value of each example."""
    for numbers in like_lengths(task.eval, spec.batch_size):
        examples = [task.eval[number] for number in numbers]
        likelihoods = completion_log_likelihoods(model, tokenizer, examples, task.completions, spec.max_length)
        for number, best in zip(numbers, likelihoods.argmax(-1).tolist(), strict=True):
            yield number, float(task.completions[best] == task.eval[number].completion)


@torch.no_grad()
def completion_log_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    completions: Sequence[str],
    max_length: int | None = None,
) -> torch.Tensor:
    """Log-likelihood of each completion after each example's prompt, float32 (examples, completions).

    The prompts run through the model once; every completion then continues from their key-value cache.
    Where a completion's first token melts with the prompt's last, all completions are counted from that token on.
    """
    rows = [encode_candidates(tokenizer, example, completions, max_length) for example in examples]
    # What all candidates of a prompt share, less one token whose output predicts the first token that differs.
    shared = [min(_common(row), *(item.start for item in row)) - 1 for row in rows]
    if min(shared) < 0:
        raise InputError(
            "a prompt has no tokens, so its labels cannot be compared; give the prompt template some text, or raise "
            "evaluation.max_length if the labels leave no room for it"
        )
    device, pad = _device(model), int(tokenizer.pad_token_id)
    longest = max(shared)
    prompts = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for place, (row, length) in enumerate(zip(rows, shared, strict=True)):
        prompts[place, longest - length :] = torch.tensor(row[0].ids[:length])
        mask[place, longest - length :] = 1
    cache = None
    if longest:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = model(
            input_ids=prompts.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
    scores = [
        _continued(model, cache, mask, [row[place] for row in rows], shared, pad) for place in range(len(completions))
    ]
    return torch.stack(scores, dim=-1).cpu()


def _common(row: Sequence[Encoded]) -> int:
    """Length of the prefix that all candidates share."""
    shortest = min(len(item.ids) for item in row)
    for place in range(shortest):
        if len({item.ids[place] for item in row}) > 1:
            return place
    return shortest


def _continued(
    model: nn.Module,
    cache: object,
    prompt_mask: torch.Tensor,
    candidates: Sequence[Encoded],
    shared: Sequence[int],
    pad: int,
) -> torch.Tensor:
    """Summed log-likelihood (batch,) of each candidate's tokens after its first `shared` + 1."""
    device = _device(model)
    rests = [item.ids[length:] for item, length in zip(candidates, shared, strict=True)]
    longest = max(len(rest) for rest in rests)
    ids = torch.full((len(rests), longest), pad)
    mask = torch.zeros((len(rests), longest), dtype=torch.int64)
    for place, rest in enumerate(rests):
        ids[place, : len(rest)] = torch.tensor(rest)
        mask[place, : len(rest)] = 1
    # Padding repeats the last position, for there may be none after it.
    positions = torch.tensor(shared)[:, None] + mask.cumsum(-1) - 1
    # The model appends to the cache it is given, and the next candidate needs the prompts' own.
    logits = model(
        input_ids=ids.to(device),
        attention_mask=torch.cat([prompt_mask, mask], dim=1).to(device),
        position_ids=positions.to(device),
        past_key_values=copy.deepcopy(cache),
        use_cache=cache is not None,
    ).logits
    log_likelihoods = F.log_softmax(logits[:, :-1].float(), dim=-1)
    targets, counted = ids[:, 1:].to(device), mask[:, 1:].to(device)
    return (log_likelihoods.gather(-1, targets[..., None])[..., 0] * counted).sum(-1)


def _generated(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, spec: EvaluationSpec
) -> Iterator[tuple[int, float]]:
    """Number and value of each example."""
    value = _exact_match if task.metric == "exact_match" else _rouge_l
    for numbers in like_lengths(task.eval, spec.batch_size):
        examples = [task.eval[number] for number in numbers]
        answers = generate(model, tokenizer, examples, task.max_new_tokens, spec.max_length)
        for number, answer in zip(numbers, answers, strict=True):
            yield number, value(answer, task.eval[number].completion)


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_new_tokens: int,
    max_length: int | None = None,
) -> list[str]:
    """Greedy answers to the examples' prompts, as text without special tokens."""
    prompts = [encode_prompt(tokenizer, example, max_length) for example in examples]
    written = generate_ids(model, tokenizer, prompts, max_new_tokens)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def generate_ids(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> torch.Tensor:
    """Greedy answers to prompts of token ids, without the prompts: int64 (prompts, at most `max_new_tokens`).

    After its end token an answer is padded.

    Raises:
        InputError: a prompt is empty.
    """
    device, pad = _device(model), int(tokenizer.pad_token_id)
    if not all(prompts):
        raise InputError("a prompt has no tokens, so there is nothing to answer; give the prompt template some text")
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    transformer: Any = model
    written: torch.Tensor = transformer.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    # An encoder-decoder model gives back its decoder's start token and the answer, a causal one the prompt before it.
    return written[:, 1 if transformer.config.is_encoder_decoder else longest :]


def _exact_match(answer: str, reference: str) -> float:
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def _rouge_l(answer: str, reference: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].fmeasure)


@dataclass(frozen=True)
class Probe:
    """A general probe: held-out text of no task. `fingerprint` is that of the text and of how much of it is read."""

    name: str
    text: str
    tokens: int

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.tokens}\0{self.text}".encode()).hexdigest()


def load_probes(spec: EvaluationSpec) -> tuple[Probe, ...]:
    """Read the general text files.

    Raises:
        InputError: a file is missing, empty or not UTF-8; or two have the same name.
    """
    probes = []
    for path in spec.general:
        if not path.is_file():
            raise InputError(f"evaluation.general: no such file: {path}")
        try:
            text = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"evaluation.general: {path} is not UTF-8 text: {error}") from error
        if not text:
            raise InputError(f"evaluation.general: {path} is empty; give a text file of a few pages")
        probes.append(Probe(path.stem, text, spec.general_tokens))
    names = [probe.name for probe in probes]
    if len(set(names)) < len(names):
        raise InputError(f"evaluation.general: two files are called {max(names, key=names.count)!r}; rename one")
    return tuple(probes)


def perplexity(model: nn.Module, tokenizer: PreTrainedTokenizerBase, probe: Probe, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of the probe's first tokens, read in windows that do not overlap."""
    ids = tokenizer(probe.text, add_special_tokens=False)["input_ids"][: probe.tokens]
    if len(ids) < 2:
        raise InputError(f"evaluation.general: {probe.name} has fewer than two tokens; give a text of a few pages")
    window = min(window, getattr(model.config, "max_position_embeddings", None) or window)
    device = _device(model)
    total, count = 0.0, 0
    with in_evaluation(model), torch.inference_mode():
        for start in range(0, len(ids) - 1, window):
            chunk = torch.tensor([ids[start : start + window]], device=device)
            if chunk.shape[1] < 2:
                continue
            logits = model(input_ids=chunk).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, chunk[0, 1:], reduction="sum"))
            count += chunk.shape[1] - 1
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf
