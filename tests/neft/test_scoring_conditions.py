"""Every scorer under the conditions that users have: bfloat16, gradient checkpointing, padding, long and odd data."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from neft.encoding import IGNORED
from neft.neurons import NeuronSpace
from neft.scoring import Scores
from neft.scoring.similarity import Similarity
from tests.neft.test_scoring import PAIRS, ROWS, TAPPED, TOKENIZER, Batch, assert_same
from tests.tiny import batch, tiny_model

#: One of each way in which models are built: gate, Conv1D, learnt positions, wide heads, no decoder, two stacks.
FAMILIES = ("llama", "gpt2", "opt", "gemma", "bert", "t5")
MATRIX = [(family, name) for family, name in PAIRS if family in FAMILIES]
#: Scorers that run the model over the data: what comes in a batch matters to no other.
READERS = [(family, name) for family, name in MATRIX if name in (*TAPPED, "similarity")]
#: Similarity fine-tunes: its steps are the batches, and each step is a mean over its own batch's tokens.
ORDERLESS = [(family, name) for family, name in MATRIX if name in TAPPED]

matrix = pytest.mark.parametrize(("family", "name"), MATRIX)
readers = pytest.mark.parametrize(("family", "name"), READERS)
orderless = pytest.mark.parametrize(("family", "name"), ORDERLESS)


def data(model: PreTrainedModel, count: int = 3) -> list[Batch]:
    """Batches whose first four tokens are a prompt."""
    batches = [batch(model, seed=seed) for seed in range(count)]
    for each in batches:
        each["labels"][:, :4] = IGNORED
    return batches


def score(model: PreTrainedModel, name: str, batches: Sequence[Batch]) -> Scores:
    return ROWS[name].score(model, TOKENIZER, NeuronSpace.from_model(model, ("ffn", "attention")), batches, seed=0)


# bfloat16


def overlap(first: Scores, second: Scores, share: float = 0.1) -> float:
    """How much of the highest-scored tenth of all sites' neurons is the same, in [0, 1]."""
    same = total = 0
    for name, values in first.values.items():
        count = max(1, round(share * len(values)))
        top = [set(scores.argsort(descending=True)[:count].tolist()) for scores in (values, second.values[name])]
        same, total = same + len(top[0] & top[1]), total + count
    return same / total


@matrix
def test_the_same_neurons_are_chosen_in_bfloat16(family: str, name: str) -> None:
    batches = data(tiny_model(family), 24)
    single, half = (score(tiny_model(family).to(dtype), name, batches) for dtype in (torch.float32, torch.bfloat16))
    # Three small steps of fine-tuning hardly move weights of eight bits.
    assert overlap(single, half) >= (0.6 if name == "similarity" else 0.9)


# Gradient checkpointing


def condition(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a scorer might leave behind on a model, by module or parameter."""
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {name: (*module._forward_hooks, *module._forward_pre_hooks) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "config": model.config.to_dict(),
    }


@matrix
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_neither_scores_nor_model(
    family: str, name: str, training: bool, reentrant: bool
) -> None:
    plain, model = tiny_model(family), tiny_model(family).train(training)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Some of the model may be kept out of training, or trained where the rest is not.
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    first.train(not training)
    list(model.parameters())[-1].requires_grad_(False)
    before = condition(model)
    # A reentrant checkpoint adds up what T5's decoder layers have for the encoder in another order; the other kind what
    # its layers have for the position bias that they share, which `similarity` trains.
    exact = family != "t5" or not (reentrant or name == "similarity")
    assert_same(score(plain, name, data(plain)), score(model, name, data(plain)), exact)
    assert condition(model) == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["taylor", "fisher", "similarity"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_layers_are_computed_anew_by_backward(family: str, name: str, reentrant: bool) -> None:
    """As in training, so that scoring takes no more memory; transformers does so in training mode alone."""
    calls = dict.fromkeys((False, True), 0)
    for checkpointing in calls:
        model = tiny_model(family)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        def count(*_: Any, of: bool = checkpointing) -> None:
            calls[of] += 1

        for site in NeuronSpace.from_model(model).sites:
            model.get_submodule(site.parts[0].module).register_forward_hook(count)
        score(model, name, data(model))
    assert calls[True] == 2 * calls[False] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(ROWS.keys() - {"keystone"}))
def test_input_gradients_that_were_asked_for_stay_and_can_still_be_turned_off(family: str, name: str) -> None:
    model = tiny_model(family)
    embeddings = model.get_input_embeddings()
    plain = condition(model)["hooks"]
    model.enable_input_require_grads()
    model.requires_grad_(False)
    score(model, name, data(model))
    assert embeddings(torch.tensor([[4]])).requires_grad
    model.disable_input_require_grads()
    assert not embeddings(torch.tensor([[4]])).requires_grad
    assert condition(model)["hooks"] == plain


# Padding


def padded(model: PreTrainedModel, inputs: Batch, left: int, right: int) -> Batch:
    """A batch with more padding; where positions are the model's to guess, they are told, as for generation."""
    values = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    longer = {key: F.pad(tensor, (left, right), value=values[key]) for key, tensor in inputs.items()}
    if model.config.is_encoder_decoder:
        # The decoder's padding stands on the right, as always: on the left it would read it before its first token.
        return longer | {"labels": F.pad(inputs["labels"], (0, right), value=IGNORED)}
    return longer | {"position_ids": (longer["attention_mask"].cumsum(-1) - 1).clamp_min(0)}


@readers
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 5), (2, 3)])
def test_padding_on_either_side_is_ignored(family: str, name: str, left: int, right: int) -> None:
    model = tiny_model(family)
    batches = data(model)
    longer = [padded(model, inputs, left, right) for inputs in batches]
    assert_same(score(model, name, batches), score(model, name, longer), exact=False)


@readers
def test_rows_of_padding_alone_are_ignored(family: str, name: str) -> None:
    model = tiny_model(family)
    whole = data(model, 1)[0]
    one = {key: tensor[:1] for key, tensor in whole.items()}
    rest = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    mostly_empty = {key: torch.cat([one[key], torch.full_like(whole[key][1:], rest[key])]) for key in one}
    assert_same(score(model, name, [one]), score(model, name, [mostly_empty]), exact=False)


# Batches


@orderless
def test_how_examples_are_put_together_does_not_matter(family: str, name: str) -> None:
    model = tiny_model(family)
    batches = data(model)
    together = {key: torch.cat([inputs[key] for inputs in batches]) for key in batches[0]}
    alone = [{key: tensor[row : row + 1] for key, tensor in together.items()} for row in reversed(range(12))]
    expected = score(model, name, batches)
    assert_same(expected, score(model, name, [together]), exact=False)
    assert_same(expected, score(model, name, alone), exact=False)


def unlabelled(inputs: Batch) -> Batch:
    return inputs | {"labels": torch.full_like(inputs["labels"], IGNORED)}


@orderless
def test_a_batch_without_labels_counts_as_its_examples_would_in_another(family: str, name: str) -> None:
    model = tiny_model(family)
    first, second = data(model, 2)
    together = {key: torch.cat([first[key], unlabelled(second)[key]]) for key in first}
    assert_same(score(model, name, [first, unlabelled(second)]), score(model, name, [together]), exact=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_passes_over_a_batch_without_labels(family: str) -> None:
    model = tiny_model(family)
    first, second, third = data(model)
    # Three steps each: the one at the batch without labels changes nothing.
    mixed = score(model, "similarity", [first, unlabelled(second), third])
    assert_same(mixed, score(model, "similarity", [first, third, unlabelled(second)]))
    assert all(not values.any() for values in score(model, "similarity", [unlabelled(first)]).values.values())


# Memory


class Stream(Sequence[Batch]):
    """Batches made when they are asked for; tells how many of them, and of all tensors, are alive at each asking."""

    def __init__(self, model: PreTrainedModel, count: int) -> None:
        self.model, self.count = model, count
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.batches_alive: list[int] = []
        self.tensors_alive: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: Any) -> Any:
        if place >= self.count:
            raise IndexError(place)
        self.batches_alive.append(sum(made() is not None for made in self.given))
        self.tensors_alive.append(sum(torch.is_tensor(each) for each in gc.get_objects()))
        made = batch(self.model, seed=place)
        self.given += [weakref.ref(made[key]) for key in made]
        return made


@pytest.mark.parametrize("name", [*TAPPED, "similarity"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_nothing_is_kept_of_a_batch(family: str, name: str) -> None:
    model = tiny_model(family)
    scorer = ROWS[name] if name != "similarity" else Similarity(steps=8)
    stream = Stream(model, 8)
    scorer.score(model, TOKENIZER, NeuronSpace.from_model(model), stream, seed=0)
    assert len(stream.batches_alive) == 8, "each batch is asked for once"
    # The last batch is still in the hands of the loop: its three tensors.
    assert max(stream.batches_alive) <= 3
    assert len(set(stream.tensors_alive[2:])) == 1
