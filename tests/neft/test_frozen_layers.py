"""Frozen layers: what is kept gives the same training, costs no lower layer a second run, and leaves nothing behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from neft import training
from neft.audit import state_digest
from neft.encoding import Encoded, collate, encode
from neft.errors import InputError
from neft.frozen_layers import FrozenLayers
from neft.neurons import NeuronSet, NeuronSpace
from neft.overlay import Overlay
from neft.tasks import Example, Task
from neft.training import TrainingResult, train
from neft.training_spec import TrainingSpec
from neft.tuner import NeftConfig
from tests.neft.helpers import differing, held
from tests.tiny import ANIMALS, CAUSAL, COLOURS, FILLERS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAD = 0
LOWEST, DEPTH, WIDTH = 2, 4, 32

#: Of several lengths, so that batches are padded.
ROWS = tuple(
    Example(f"Text: {colour} {animal} {' '.join(FILLERS[: place % 4])} Kind:", (" warm", " cold wild tame")[place % 2])
    for place, (colour, animal) in enumerate(zip(COLOURS * 2, ANIMALS * 2, strict=True))
)
ENCODED = tuple(encode(TOKENIZER, example) for example in ROWS)
TASK = Task("toy", ROWS, ROWS, "accuracy", (" warm", " cold wild tame"))
TOKENS = sum(len(item.ids) for item in ENCODED)


def deep_model(family: str = "llama", dropout: float = 0.0) -> PreTrainedModel:
    """A tiny model of four layers."""
    config = tiny_model(family).config
    described = config.to_dict()
    described.pop("layer_types", None)
    described |= {name: dropout for name in described if name.endswith(("dropout", "pdrop"))}
    described["n_layer" if "n_layer" in described else "num_hidden_layers"] = DEPTH
    torch.manual_seed(0)
    return type(tiny_model(family))(type(config)(**described)).eval()


def upper(model: PreTrainedModel, lowest: int = LOWEST) -> NeuronSet:
    """Half of the neurons from layer `lowest` up."""
    space = NeuronSpace.from_model(model)
    return NeuronSet(space, {site.name: range(0, site.size, 2) for site in space.sites if site.layer >= lowest})


def adapted(model: PreTrainedModel, lowest: int = LOWEST) -> PeftModel:
    return get_peft_model(model, NeftConfig.from_neurons(upper(model, lowest), task_type="CAUSAL_LM"))


def spec(epochs: int = 3, **changes: Any) -> TrainingSpec:
    defaults = {"num_train_epochs": epochs, "learning_rate": 0.01, "per_device_train_batch_size": 4, "max_length": 32}
    return TrainingSpec.model_validate(defaults | {"cache_frozen_layers": True} | changes)


def learnt(family: str = "llama", **changes: Any) -> tuple[Overlay, TrainingResult, list[float]]:
    """The overlay, the result and the losses of one training."""
    model, losses = deep_model(family), []
    peft_model = adapted(model)

    def note(step: int, values: Any) -> None:
        losses.extend(value for name, value in values.items() if name in ("loss", "eval_loss"))

    result = train(peft_model, TOKENIZER, TASK, spec(logging_steps=1, **changes), 0, note)
    return cast(Any, peft_model.base_model).overlay(upper(model)), result, losses


def parts(model: PreTrainedModel) -> list[nn.Module]:
    """Something that runs whenever a layer does, for each layer."""
    endings = ("mlp", "fc1")
    return [module for name, module in model.named_modules() if name.split(".")[-1] in endings]


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Counter[int]]:
    """How often each layer has run."""
    runs: Counter[int] = Counter()
    hooks = [
        part.register_forward_pre_hook(lambda *_, layer=layer: runs.update([layer]))
        for layer, part in enumerate(parts(model))
    ]
    assert len(hooks) == DEPTH
    yield runs
    for hook in hooks:
        hook.remove()


def inputs_of(numbers: Sequence[int]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A batch of the rows with those numbers, and their lengths."""
    chosen: list[Encoded] = [ENCODED[number] for number in numbers]
    return collate(chosen, PAD), [len(item.ids) for item in chosen]


def loss_of(model: nn.Module, frozen: FrozenLayers, numbers: Sequence[int]) -> torch.Tensor:
    batch, lengths = inputs_of(numbers)
    with frozen.batch(numbers, lengths):
        return cast(torch.Tensor, model(**batch).loss)


def forwards(model: nn.Module) -> list[str]:
    """Modules whose forward is not their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


# Training with what was kept


@pytest.mark.parametrize("family", CAUSAL)
def test_training_with_kept_states_equals_training_without(family: str) -> None:
    overlay, result, losses = learnt(family)
    reference, plain, expected = learnt(family, cache_frozen_layers=False)
    assert result.steps == plain.steps == 9
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[:3] == expected[:3]
    for name, values in reference.values.items():
        torch.testing.assert_close(overlay.values[name], values, rtol=1e-3, atol=1e-4)
    assert plain.cached_bytes == 0
    assert result.cached_bytes == TOKENS * WIDTH * 4


@pytest.mark.parametrize("family", CAUSAL)
def test_the_first_epoch_is_the_same_bit_for_bit(family: str) -> None:
    overlay, reference = learnt(family, epochs=1)[0], learnt(family, epochs=1, cache_frozen_layers=False)[0]
    assert all(torch.equal(overlay.values[name], values) for name, values in reference.values.items())


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"per_device_train_batch_size": 5},
        {"early_stopping_patience": 2, "eval_steps": 2, "validation_fraction": 0.25},
    ],
    ids=str,
)
def test_other_settings_go_with_it(changes: dict[str, Any]) -> None:
    overlay, _, losses = learnt(**changes)
    reference, _, expected = learnt(**changes, cache_frozen_layers=False)
    rough = 2e-2 if "bf16" in changes else 1e-4
    assert losses == pytest.approx(expected, rel=rough)
    for name, values in reference.values.items():
        torch.testing.assert_close(overlay.values[name], values, rtol=rough, atol=rough)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lower_layers_run_in_the_first_epoch_alone(family: str, checkpointing: bool) -> None:
    model = deep_model(family)
    peft_model = adapted(model)
    with counted(model) as runs:
        train(peft_model, TOKENIZER, TASK, spec(gradient_checkpointing=checkpointing), 0)
    again = 2 if checkpointing else 1
    assert [runs[layer] for layer in range(DEPTH)] == [3, 3, 9 * again, 9 * again]


def test_rows_held_out_for_early_stopping_have_states_of_their_own() -> None:
    model = deep_model()
    peft_model = adapted(model)
    changes = {"early_stopping_patience": 9, "eval_steps": 1, "validation_fraction": 0.25, "learning_rate": 1e-6}
    with counted(model) as runs:
        result = train(peft_model, TOKENIZER, TASK, spec(**changes), 0)
    # Nine rows in batches of 4, 4 and 1, three epochs long; three held-out rows, looked at after every step.
    assert result.steps == 9
    assert [runs[layer] for layer in range(DEPTH)] == [3 + 1, 3 + 1, 9 + 9, 9 + 9]
    assert result.cached_bytes == TOKENS * WIDTH * 4


def test_the_bytes_held_are_a_point_of_the_curves() -> None:
    points: list[tuple[int, float]] = []
    result = train(
        adapted(deep_model()),
        TOKENIZER,
        TASK,
        spec(),
        0,
        lambda step, values: points.extend((step, values[name]) for name in values if name == "cached_bytes"),
    )
    assert points == [(9, result.cached_bytes)]


# Nothing left behind


@pytest.mark.parametrize("family", CAUSAL)
def test_the_model_is_afterwards_as_before(family: str) -> None:
    model = deep_model(family)
    digest, batch = state_digest(model), inputs_of(range(4))[0]
    with torch.no_grad():
        before = model(**batch).logits
    peft_model = adapted(model)
    train(peft_model, TOKENIZER, TASK, spec(2), 0)
    assert forwards(model) == []
    assert state_digest(peft_model.unload()) == digest
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_training_leaves_nothing_behind(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model()
    peft_model = adapted(model)
    seen = 0

    def interrupt(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3 * epoch - 1:
            raise KeyboardInterrupt

    hook = parts(model)[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(peft_model, TOKENIZER, TASK, spec(), 0)
    hook.remove()
    assert forwards(peft_model) == []


@pytest.mark.parametrize("known", [False, True])
def test_a_batch_that_fails_puts_every_forward_back(known: bool) -> None:
    peft_model = adapted(deep_model())
    frozen = FrozenLayers(peft_model)
    if known:
        loss_of(peft_model, frozen, [0, 1])
    with pytest.raises(KeyboardInterrupt), frozen.batch([0, 1], inputs_of([0, 1])[1]):
        assert forwards(peft_model)
        raise KeyboardInterrupt
    assert forwards(peft_model) == []


def test_a_forward_that_somebody_else_had_replaced_is_put_back() -> None:
    model = deep_model()
    layer, calls = model.get_submodule("model.layers.0"), []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    vars(layer)["forward"] = theirs
    peft_model = adapted(model)
    frozen = FrozenLayers(peft_model)
    for _ in range(2):
        loss_of(peft_model, frozen, [0, 1])
        assert vars(layer)["forward"] is theirs
    assert len(calls) == 1


# The core: one batch


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("lowest", [1, 2, 3])
def test_another_batch_of_known_examples_has_the_same_loss_and_gradients(family: str, lowest: int) -> None:
    model = deep_model(family)
    peft_model = adapted(model, lowest).train()
    frozen = FrozenLayers(peft_model)
    for numbers in ([0, 1, 2], [3, 4, 5]):
        loss_of(peft_model, frozen, numbers)
    mixed = [5, 0, 3]
    expected = peft_model(**inputs_of(mixed)[0]).loss
    expected.backward()
    gradients = {name: each.grad.clone() for name, each in peft_model.named_parameters() if each.grad is not None}
    peft_model.zero_grad()
    with counted(model) as runs:
        loss = loss_of(peft_model, frozen, mixed)
    assert sorted(runs) == list(range(lowest, DEPTH))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(peft_model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_with_a_new_example_runs_whole_and_is_known_afterwards() -> None:
    model = deep_model()
    peft_model = adapted(model)
    frozen = FrozenLayers(peft_model)
    loss_of(peft_model, frozen, [0, 1])
    with counted(model) as runs:
        loss_of(peft_model, frozen, [1, 2])
        assert runs[0] == runs[3] == 1
        loss_of(peft_model, frozen, [2, 0])
        assert (runs[0], runs[3]) == (1, 2)
    assert frozen.bytes == sum(len(ENCODED[number].ids) for number in (0, 1, 2)) * WIDTH * 4


def test_what_is_kept_does_not_hold_the_padded_batch_in_memory() -> None:
    peft_model = adapted(deep_model())
    frozen = FrozenLayers(peft_model)
    loss_of(peft_model, frozen, range(12))
    assert frozen.bytes == sum(states.untyped_storage().nbytes() for states in frozen._states.values())


def test_states_are_kept_in_their_own_dtype() -> None:
    model = deep_model().to(torch.bfloat16)
    peft_model = adapted(model)
    frozen = FrozenLayers(peft_model)
    first = loss_of(peft_model, frozen, [0, 1, 2])
    assert frozen.bytes == sum(len(ENCODED[number].ids) for number in (0, 1, 2)) * WIDTH * 2
    assert torch.equal(loss_of(peft_model, frozen, [0, 1, 2]), first)


def test_no_gradient_goes_below_even_where_inputs_require_it() -> None:
    model = deep_model()
    model.enable_input_require_grads()
    peft_model = adapted(model).train()
    frozen, entering = FrozenLayers(peft_model), []
    layer = model.get_submodule("model.layers.2")
    layer.register_forward_pre_hook(lambda _, args: entering.append(args[0].requires_grad))
    for _ in range(2):
        loss_of(peft_model, frozen, [0, 1]).backward()
    assert entering == [False, False]


def test_weights_of_the_base_are_not_touched() -> None:
    peft_model = adapted(deep_model())
    before = held(peft_model)
    frozen = FrozenLayers(peft_model)
    with torch.no_grad():
        loss_of(peft_model, frozen, [0, 1])
        loss_of(peft_model, frozen, [0, 1])
    assert differing(before, held(peft_model)) == []


def test_an_adapter_of_another_method_above_frozen_layers() -> None:
    model = deep_model()
    config = LoraConfig(target_modules=["up_proj"], layers_to_transform=[2, 3], task_type="CAUSAL_LM", lora_dropout=0.5)
    peft_model = get_peft_model(model, config).train()
    frozen = FrozenLayers(peft_model)
    with counted(model) as runs:
        loss_of(peft_model, frozen, [0, 1])
        loss_of(peft_model, frozen, [1, 0])
    assert [runs[layer] for layer in range(DEPTH)] == [1, 1, 2, 2]


class Tuples(nn.Module):
    """A model whose layers return their hidden states in a tuple, with `rest` after them."""

    def __init__(self, rest: tuple[Any, ...]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)).requires_grad_(False)
        self.layers[2].requires_grad_(True)
        self.rest = rest
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, output: output if isinstance(output, tuple) else None)
        for layer in self.layers:
            vars(layer)["forward"] = self._wrapped(layer.forward)

    def _wrapped(self, forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        return lambda hidden_states, scale=1.0: (forward(hidden_states) * scale, *self.rest)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            output = layer(hidden_states=hidden, scale=2.0)
            assert len(output) == 1 + len(self.rest)
            hidden = output[0]
        return hidden


@pytest.mark.parametrize("rest", [(), (None,)])
def test_layers_that_return_tuples_are_recalled_as_tuples(rest: tuple[Any, ...]) -> None:
    model = Tuples(rest)
    frozen, hidden = FrozenLayers(model), torch.rand(2, 3, 4)
    expected = model(hidden)
    for entering in (hidden, torch.zeros(2, 3, 4)):
        with frozen.batch([7, 8], [3, 3]):
            assert torch.equal(model(entering), expected)


# Refusals


def refusal(model: nn.Module) -> str:
    with pytest.raises(InputError) as caught:
        FrozenLayers(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_lies_below_the_first_layer() -> None:
    peft_model = adapted(deep_model(), lowest=0)
    with pytest.raises(InputError, match=r"the first one, model\.layers\.0, .* method\.selection\.lowest_layer"):
        train(peft_model, TOKENIZER, TASK, spec(), 0)
    assert forwards(peft_model) == []
    assert "the first one, model.layers.0" in refusal(deep_model())


def test_what_is_trained_outside_the_layers_is_refused() -> None:
    model = deep_model()
    peft_model = adapted(model)
    model.get_input_embeddings().requires_grad_(True)
    assert "model.embed_tokens.weight is trained too, outside the layers" in refusal(peft_model)


def test_a_model_whose_layers_cannot_be_told_is_refused() -> None:
    model = deep_model().requires_grad_(False)
    assert "no layer is trained" in refusal(model)
    two = nn.ModuleDict({"left": deep_model(), "right": deep_model()})
    assert "(left.model.layers, right.model.layers)" in refusal(two)


def test_encoder_and_decoder_are_refused() -> None:
    assert "an encoder and a decoder" in refusal(tiny_model("t5"))


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "llama"])
def test_active_dropout_is_refused_and_leaves_nothing_behind(family: str) -> None:
    peft_model = adapted(deep_model(family, dropout=0.25))
    with pytest.raises(InputError, match=r"drops out 25% at random.*whose config has no dropout"):
        train(peft_model, TOKENIZER, TASK, spec(), 0)
    assert forwards(peft_model) == []


def test_dropout_that_is_not_active_does_no_harm() -> None:
    peft_model = adapted(deep_model("gpt2", dropout=0.25)).eval()
    frozen = FrozenLayers(peft_model)
    assert torch.equal(loss_of(peft_model, frozen, [0, 1]), loss_of(peft_model, frozen, [0, 1]))
    peft_model.train()
    with pytest.raises(InputError, match="drops out"):
        loss_of(peft_model, frozen, [0, 1])


def test_layers_that_return_more_than_hidden_states_are_refused() -> None:
    model = Tuples((torch.ones(1),))
    frozen = FrozenLayers(model)
    with pytest.raises(InputError, match="return more than hidden states"), frozen.batch([0], [3]):
        model(torch.rand(1, 3, 4))


def test_a_number_that_stands_for_another_example_is_refused() -> None:
    peft_model = adapted(deep_model())
    frozen = FrozenLayers(peft_model)
    loss_of(peft_model, frozen, [0, 1])
    batch, lengths = inputs_of([2, 3])
    assert lengths[0] != len(ENCODED[0].ids)
    with pytest.raises(InputError, match=r"example 0 has \d+ tokens, but had \d+"), frozen.batch([0, 1], lengths):
        peft_model(**batch)


@pytest.mark.parametrize(
    "clash",
    [{"packing": True}, {"neftune_noise_alpha": 5.0}, {"torch_compile": True}],
    ids=lambda clash: next(iter(clash)),
)
def test_settings_that_change_what_enters_the_layers_are_refused(clash: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"does not go with `{next(iter(clash))}`"):
        spec(**clash)
    assert spec(**clash, cache_frozen_layers=False)


def test_without_it_the_trainer_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(training, "FrozenLayers", refuse)
    assert learnt(cache_frozen_layers=False)[1].cached_bytes == 0
