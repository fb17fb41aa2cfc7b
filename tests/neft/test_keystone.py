"""Keystones: what follows from hand-chosen activities, what is seen of a model, and silence that leaves no trace."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from neft.audit import state_digest
from neft.errors import FailedError, InputError
from neft.keystone import DEFAULT_PROMPTS, Keystones, KeystoneSearch, read_prompts, silenced
from neft.neurons import KINDS, Kind, NeuronSet, NeuronSpace, Site
from neft.scoring.keystone import Keystone
from tests.neft.helpers import draw
from tests.neft.helpers import logits as logits_of
from tests.tiny import KEYSTONE_PROMPTS, batch, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts in the words of the tiny tokenizer, of unlike lengths."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    path.write_text(yaml.safe_dump(KEYSTONE_PROMPTS, sort_keys=False))
    return path


# By hand


def by_hand(rho: float = 0.5) -> Keystones:
    space = NeuronSpace(tuple(Site(name, "ffn", 4, ()) for name in ("a", "b")), 100)
    activity = {
        "maths": {"a": [4.0, 3.0, 2.0, 1.0], "b": [1.0, 1.0, 0.0, 0.0]},
        "code": {"a": [1.0, 5.0, 6.0, 0.0], "b": [0.0, 8.0, 0.0, 8.0]},
    }
    return Keystones(
        space,
        {name: {site: torch.tensor(row).double() for site, row in rows.items()} for name, rows in activity.items()},
        rho,
    )


def test_the_strongest_of_each_site_are_intersected() -> None:
    found = by_hand()
    chosen = {
        name: {site: each.tolist() for site, each in neurons.indices.items()}
        for name, neurons in found.by_capability.items()
    }
    assert chosen == {"maths": {"a": [0, 1], "b": [0, 1]}, "code": {"a": [1, 2], "b": [1, 3]}}
    assert set(found.neurons) == {("a", 1), ("b", 1)}
    assert found.overlaps() == {("maths", "code"): pytest.approx(2 / 6)}
    assert found.capabilities_of("a").tolist() == [1, 2, 1, 0]


def test_strength_is_a_multiple_of_the_sites_mean_averaged_over_capabilities() -> None:
    found = by_hand()
    a = [(4 / 2.5 + 1 / 3) / 2, (3 / 2.5 + 5 / 3) / 2, (2 / 2.5 + 6 / 3) / 2, (1 / 2.5 + 0) / 2]
    assert found.strength["a"].tolist() == pytest.approx(a)
    assert found.strength["b"].tolist() == pytest.approx([1.0, 2.0, 0.0, 1.0])
    assert found.ranking == (("b", 1), ("a", 1))
    assert set(found.top(1)) == {("b", 1)}
    assert found.top(2) == found.neurons
    assert len(found.top(0)) == 0
    for count in (3, -1):
        with pytest.raises(InputError, match=rf"the {count} strongest keystones are asked for, but there are 2"):
            found.top(count)


def test_at_least_one_neuron_of_each_site_counts() -> None:
    assert [len(neurons) for neurons in by_hand(rho=0.01).by_capability.values()] == [2, 2]
    assert [len(neurons) for neurons in by_hand(rho=0.75).by_capability.values()] == [6, 6]


def test_a_site_that_never_fires_has_no_strength() -> None:
    found = by_hand()
    for rows in found.activity.values():
        rows["b"].zero_()
    assert found.strength["b"].tolist() == [0.0] * 4


def test_the_scorer_puts_capabilities_before_strength(prompts: Path) -> None:
    scorer = Keystone(prompts=prompts, rho=0.2, new_tokens=6)
    model = tiny_model()
    space = NeuronSpace.from_model(model)
    found = scorer.find(model, TOKENIZER, space)
    scores = scorer.score(model, TOKENIZER, space, [], seed=0).values
    for site in space.sites:
        assert torch.equal(scores[site.name].floor().long(), found.capabilities_of(site.name))
        same = found.capabilities_of(site.name) == 0
        order = scores[site.name][same].argsort()
        assert found.strength[site.name][same][order].diff().min() >= -1e-6
    weakest = min(float(scores[name][index]) for name, index in found.neurons)
    others = [float(scores[name][index]) for name, index in space.all() - found.neurons]
    assert weakest >= 3 > max(others)


def test_scores_of_very_strong_neurons_stay_apart_and_below_the_next_whole_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space = NeuronSpace((Site("a", "ffn", 20_000, ()),), 100)
    loud = torch.full((20_000,), 1e-6, dtype=torch.float64)
    loud[:3] = torch.tensor([1.0, 1.0005, 1.001])
    found = Keystones(space, {name: {"a": loud} for name in ("maths", "code", "knowledge")}, rho=0.00015)
    monkeypatch.setattr(Keystone, "find", lambda *_: found)
    values = Keystone().score(tiny_model(), TOKENIZER, space, [], seed=0).values["a"]
    assert found.strength["a"].max() > 6_000
    assert values[:3].floor().tolist() == [3, 3, 3]
    assert values[0] < values[1] < values[2]
    assert values[3:].max() < 1


# In a model


def reference(model: PreTrainedModel, text: str, new_tokens: int) -> tuple[dict[int, torch.Tensor], int]:
    """Summed |activation| per layer over the tokens written after one prompt, by plain loops, and their number."""
    ids = TOKENIZER(text)["input_ids"]
    start = len(ids)
    while len(ids) < start + new_tokens and (len(ids) == start or ids[-1] != TOKENIZER.eos_token_id):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    found: dict[int, torch.Tensor] = {}
    blocks = [each.mlp.down_proj for each in model.model.layers]
    handles = [
        block.register_forward_pre_hook(lambda _, args, place=place: found.update({place: args[0][0, start:]}))
        for place, block in enumerate(blocks)
    ]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {place: seen.abs().sum(0) for place, seen in found.items()}, len(ids) - start


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@torch.no_grad()
def test_activity_is_the_mean_over_generated_tokens(family: str, prompts: Path) -> None:
    model = tiny_model(family)
    space = NeuronSpace.from_model(model)
    found = KeystoneSearch(prompts=prompts, new_tokens=7).find(model, TOKENIZER, space)
    assert list(found.activity) == list(KEYSTONE_PROMPTS)
    for capability, texts in KEYSTONE_PROMPTS.items():
        parts = [reference(model, text, 7) for text in texts]
        for place, site in enumerate(space.sites):
            expected = sum(sums[place] for sums, _ in parts) / sum(count for _, count in parts)
            assert expected.max() > 0
            torch.testing.assert_close(found.activity[capability][site.name].float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", [15, 23])
@torch.no_grad()
def test_an_answer_ends_with_its_end_token(seed: int, prompts: Path) -> None:
    """The end token counts as written, the padding after it does not."""
    model = tiny_model(seed=seed)
    space = NeuronSpace.from_model(model)
    found = KeystoneSearch(prompts=prompts, new_tokens=7).find(model, TOKENIZER, space)
    lengths = set()
    for capability, texts in KEYSTONE_PROMPTS.items():
        parts = [reference(model, text, 7) for text in texts]
        lengths |= {count for _, count in parts}
        expected = sum(sums[0] for sums, _ in parts) / sum(count for _, count in parts)
        torch.testing.assert_close(
            found.activity[capability][space.sites[0].name].float(), expected, rtol=1e-4, atol=1e-6
        )
    assert len(lengths) > 2 and max(lengths) == 7  # of these seeds, some answers end early


@torch.no_grad()
def test_a_decoder_that_reads_an_encoder_is_seen_on_its_own_answer(prompts: Path) -> None:
    model = tiny_model("t5")
    space = NeuronSpace.from_model(model)
    found = KeystoneSearch(prompts=prompts, new_tokens=5).find(model, TOKENIZER, space)
    (text,) = KEYSTONE_PROMPTS["fillers"]
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    answer = [0]
    while len(answer) < 6 and (len(answer) == 1 or answer[-1] != TOKENIZER.eos_token_id):
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([answer])).logits
        answer.append(int(logits[0, -1].argmax()))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(site.tap.module).register_forward_pre_hook(
            lambda _, args, name=site.name: seen.update({name: args[0]})
        )
        for site in space.sites
    ]
    model(input_ids=ids, decoder_input_ids=torch.tensor([answer[:-1]]))
    for handle in handles:
        handle.remove()
    assert {name.split(".")[0] for name in seen} == {"encoder", "decoder"}
    for name, activation in seen.items():
        expected = activation.abs().mean((0, 1))
        torch.testing.assert_close(found.activity["fillers"][name].float(), expected, rtol=1e-4, atol=1e-6)


def hooks_of(model: nn.Module) -> list[int]:
    """How many hooks each module has: gradient checkpointing brings one of its own."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_the_model_is_left_as_it_was_and_a_second_look_sees_the_same(
    prompts: Path, dtype: torch.dtype, family: str, checkpointing: bool
) -> None:
    """GPT-2 drops out while it trains; nothing of it shows here."""
    model = tiny_model(family).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    frozen = next(model.parameters()).requires_grad_(False)
    before, chance, hooks = state_digest(model), torch.get_rng_state(), hooks_of(model)
    space = NeuronSpace.from_model(model, ("ffn", "attention"))
    search = KeystoneSearch(prompts=prompts, rho=0.2, new_tokens=5)
    first, second = (search.find(model, TOKENIZER, space) for _ in range(2))
    assert state_digest(model) == before
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert not frozen.requires_grad
    assert hooks_of(model) == hooks
    for capability, sites in first.activity.items():
        for name, values in sites.items():
            assert values.dtype == torch.float64
            assert torch.equal(values, second.activity[capability][name])
    assert first.ranking == second.ranking
    assert len(first.neurons) > 0


def test_a_model_that_does_not_generate_is_refused(prompts: Path) -> None:
    model = tiny_model("bert")
    space = NeuronSpace.from_model(model)
    with pytest.raises(InputError, match="BertForMaskedLM does not generate"):
        KeystoneSearch(prompts=prompts).find(model, TOKENIZER, space)


def test_prompts_that_outgrow_the_models_positions_are_refused(prompts: Path) -> None:
    model = tiny_model()
    with pytest.raises(
        InputError, match=r"prompt of 'colours' in .*prompts\.yaml has 5 tokens, and new_tokens 60 .* 64 positions"
    ):
        KeystoneSearch(prompts=prompts, new_tokens=60).find(model, TOKENIZER, NeuronSpace.from_model(model))
    KeystoneSearch(prompts=prompts, new_tokens=59).find(model, TOKENIZER, NeuronSpace.from_model(model))


def test_activations_that_are_not_finite_are_refused(prompts: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(FailedError, match=r"model\.layers\.1\.ffn' are not finite.*model\.dtype"):
        KeystoneSearch(prompts=prompts).find(model, TOKENIZER, NeuronSpace.from_model(model))


# Silence


@torch.no_grad()
def without(model: PreTrainedModel, neurons: NeuronSet) -> PreTrainedModel:
    """A copy whose weights, and biases, compute nothing at the places where the neurons' activations are seen."""
    changed = copy.deepcopy(model)
    for name, indices in neurons.indices.items():
        part = neurons.space.site(name).tap
        positions = torch.from_numpy(part.positions(indices).ravel())
        module = changed.get_submodule(part.module)
        rows_first = isinstance(module, nn.Linear) == (part.side == "row")
        module.weight.index_fill_(0 if rows_first else 1, positions, 0)
        if part.side == "row" and module.bias is not None:
            module.bias.index_fill_(0, positions, 0)
    return changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_silenced_neurons_compute_nothing_and_come_back_bit_for_bit(family: str, kind: Kind) -> None:
    model, inputs = tiny_model(family), batch(tiny_model(family))
    neurons = draw(NeuronSpace.from_model(model, (kind,)))
    before, digest = logits_of(model, inputs), state_digest(model)
    expected = logits_of(without(model, neurons), inputs)
    with silenced(model, neurons):
        torch.testing.assert_close(logits_of(model, inputs), expected)
        assert not torch.equal(expected, before)
        assert state_digest(model) == digest
    assert torch.equal(logits_of(model, inputs), before)
    assert state_digest(model) == digest


def test_silence_ends_with_an_error_too_and_may_be_empty() -> None:
    model = tiny_model()
    space, inputs = NeuronSpace.from_model(model), batch(model)
    before = logits_of(model, inputs)
    with pytest.raises(ZeroDivisionError), silenced(model, space.all()):
        raise ZeroDivisionError
    assert not any(hooks_of(model))
    with silenced(model, space.none()):
        assert torch.equal(logits_of(model, inputs), before)


# Prompts and options


def test_the_prompts_that_neft_comes_with_are_read_and_packaged() -> None:
    assert list(KeystoneSearch().capabilities) == ["knowledge", "maths", "code", "multilingual"]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert DEFAULT_PROMPTS.name in project["tool"]["setuptools"]["package-data"]["neft"]
    assert DEFAULT_PROMPTS.parent.name == "neft"


def test_a_single_prompt_needs_no_list(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("maths: '2 + 2 ='\ncode: ['def', 'for']\n")
    assert read_prompts(path) == {"maths": ("2 + 2 =",), "code": ("def", "for")}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "prompts.yaml is not YAML"),
        ("", "must map at least two capabilities to their prompts"),
        ("- a", "must map at least two capabilities"),
        ("a: [x]", "must map at least two capabilities"),
        ("a: [x]\nb: []", "'b' in"),
        ("a: [x]\nb: 3", "is 3; give it a list of prompts"),
        ("a: [x]\nb: [3]", "a prompt of 'b' in"),
        ("a: [x]\nb: ['  ']", "is '  '; write some text"),
        ("a: [x]\n3: [y]", "names a capability 3, which is no text"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        KeystoneSearch(prompts=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_that_are_missing_or_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file: .*gone\.yaml; give a YAML file"):
        KeystoneSearch(prompts=tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: [ä]\nb: [ö]".encode("latin-1"))
    with pytest.raises(InputError, match="is not YAML"):
        KeystoneSearch(prompts=tmp_path / "latin.yaml")
    with pytest.raises(InputError, match="option 'prompts' of 'keystone' is 3; it must be the path"):
        KeystoneSearch(prompts=3)


@pytest.mark.parametrize("rho", [0, 1, -0.1, True, "x", float("nan")])
def test_a_share_outside_its_range_is_refused(rho: float) -> None:
    with pytest.raises(InputError, match=r"option 'rho' of 'keystone' is .*; it must be a number between 0 and 1"):
        KeystoneSearch(rho=rho)


def test_a_number_of_tokens_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="'new_tokens' of 'keystone' is 0; it must be a whole number above 0"):
        KeystoneSearch(new_tokens=0)
