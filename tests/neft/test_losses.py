"""The loss of completions equals the model's own, whatever the batch looks like."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from neft import NeftConfig, NeuronSpace
from neft.encoding import IGNORED
from neft.losses import completion_loss, takes_positions
from tests.tiny import CAUSAL, WORDS, batch, tiny_model

Inputs = dict[str, torch.Tensor]


def ragged(rows: list[tuple[int, int]], longest: int = 12) -> Inputs:
    """A right-padded batch; each row is given by the lengths of its prompt and its completion."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(WORDS), (len(rows), longest), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        mask[row, : prompt + completion] = 1
        labels[row, prompt : prompt + completion] = ids[row, prompt : prompt + completion]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


BATCHES = {
    "like lengths": ragged([(8, 4), (8, 4)]),
    "unlike completions and padding": ragged([(3, 1), (5, 7), (2, 6), (9, 3)]),
    "some rows without completion": ragged([(6, 0), (4, 3), (12, 0)]),
    "no prompt": ragged([(0, 12), (0, 5)]),
    "one token": ragged([(11, 1)]),
}


def gradients(model: nn.Module, loss: torch.Tensor) -> Inputs:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def targets(inputs: Inputs) -> int:
    """A causal model's loss is over the labels after the first token."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_are_the_models_own_times_the_number_of_tokens(family: str, name: str) -> None:
    model, inputs = tiny_model(family), BATCHES[name]
    assert takes_positions(model)
    loss, count = completion_loss(model, inputs)
    own = model(**inputs).loss
    assert loss.shape == ()
    assert int(count) == targets(inputs) > 0
    torch.testing.assert_close(loss, own * count, rtol=1e-5, atol=1e-5)
    found, expected = gradients(model, loss), gradients(model, own * count)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-4, msg=parameter)
    assert sum(float(gradient.abs().sum()) for gradient in found.values()) > 0


@pytest.mark.parametrize("family", CAUSAL)
def test_a_batch_without_labels_has_no_loss_and_no_gradient(family: str) -> None:
    """The model's own loss, a mean over no token, is not a number there."""
    model = tiny_model(family)
    loss, count = completion_loss(model, ragged([(5, 0), (12, 0)]))
    assert int(count) == 0
    assert float(loss) == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("family", CAUSAL)
def test_the_head_runs_only_where_a_completion_is_predicted(family: str) -> None:
    model, inputs = tiny_model(family), ragged([(6, 2), (8, 1)])
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    completion_loss(model, inputs)
    # Tokens 6, 7 and 8 are predicted from those before them; all of it in one product.
    assert seen == [(2, 3)]


def test_the_loss_of_a_model_in_bfloat16_is_summed_in_single_precision() -> None:
    model: PreTrainedModel = tiny_model().to(torch.bfloat16)
    inputs = BATCHES["unlike completions and padding"]
    loss, count = completion_loss(model, inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**inputs).loss.float() * count, rtol=1e-3, atol=1e-3)


def test_a_peft_model_around_a_causal_one_has_the_same_loss() -> None:
    plain, model = tiny_model(), tiny_model()
    inputs = batch(model)
    neurons = NeuronSpace.from_model(model).all()
    adapted = get_peft_model(model, NeftConfig.from_neurons(neurons, task_type="CAUSAL_LM"))
    assert torch.equal(completion_loss(adapted, inputs)[0], completion_loss(plain, inputs)[0])


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_other_models_run_their_own_head(family: str) -> None:
    assert not takes_positions(tiny_model(family))
