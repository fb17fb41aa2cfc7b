"""Every family's neurons: how many, how large, and that their rows and columns are what the model computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neft import InputError, NeuronSet, NeuronSpace, Overlay
from neft.architectures import ANATOMIES, Anatomy, Attention, FeedForward, anatomy_of
from neft.neurons import KINDS, Kind, Part, Site
from neft.overlay import storage_dim
from tests.neft.helpers import draw, logits
from tests.tiny import FAMILIES, batch, tiny_model

HEAD = 8
WIDTH = 32
#: Channels of one key-value head that rotary embeddings, whole (Llama) or partial (GPT-NeoX), do not mix with others.
UNMIXED = [0, 1, 4, 5]
KEY, VALUE = 1, 2

Neurons = np.ndarray[Any, np.dtype[np.int64]]


class Row(NamedTuple):
    """What a family's tiny model must show."""

    ffn_sites: int
    ffn_width: int
    attention_sites: int
    channels: int
    groups: int


PLAIN, GATED = 2 * WIDTH, 3 * WIDTH
GROUPED = Row(2, GATED, 2, 16, 2)
EXPECTED = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gpt2": Row(2, PLAIN, 2, 32, 1),
    "gpt_neox": Row(2, PLAIN, 2, 32, 1),
    "opt": Row(2, PLAIN, 2, 32, 1),
    "bert": Row(2, PLAIN, 2, 32, 1),
    # Encoder and decoder: four feed-forward blocks, and cross-attention in the decoder.
    "t5": Row(4, PLAIN, 6, 32, 1),
    "t5_gated": Row(4, GATED, 6, 32, 1),
}


def expected_sizes(row: Row, kind: Kind) -> tuple[int, int, int]:
    """Sites, neurons a site, and parameters a neuron."""
    return {
        "ffn": (row.ffn_sites, 64, row.ffn_width),
        "ffn_in": (row.ffn_sites, 64, WIDTH),
        "ffn_out": (row.ffn_sites, 64, WIDTH),
        "attention": (row.attention_sites, row.channels, WIDTH + row.groups * WIDTH),
        "qk": (row.attention_sites, row.channels, WIDTH + row.groups * WIDTH),
    }[kind]


def test_every_family_has_a_row() -> None:
    assert set(EXPECTED) == set(FAMILIES)
    assert {tiny_model(family).config.model_type for family in FAMILIES} == set(ANATOMIES) - {"gemma3_text"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lively(family: str) -> PreTrainedModel:
    """A model whose every weight matters: wide random matrices, and no bias in front of an activation."""
    model = tiny_model(family)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.weight.normal_(0, 0.2)
                if module.bias is not None:
                    module.bias.zero_()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_sites_and_sizes(family: str, kind: Kind) -> None:
    model = tiny_model(family)
    space = NeuronSpace.from_model(model, [kind])
    sites, size, parameters = expected_sizes(EXPECTED[family], kind)
    assert [(site.kind, site.size, site.neuron_parameters) for site in space.sites] == [
        (kind, size, parameters)
    ] * sites
    assert len({site.name for site in space.sites}) == sites
    assert len(space) == sites * size
    assert space.parameters == len(space) * parameters
    assert space.model_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_owns_as_many_parameters_as_its_rows_hold(family: str, kind: Kind) -> None:
    model = tiny_model(family)
    neurons = draw(NeuronSpace.from_model(model, [kind]))
    assert neurons.parameters == Overlay.read(model, neurons).parameters


@pytest.mark.parametrize("kinds", [("ffn",), ("ffn_in", "ffn_out"), ("attention", "qk")], ids="+".join)
def test_all_neurons_share_out_their_weights_without_overlap(family: str, kinds: tuple[Kind, ...]) -> None:
    model = tiny_model(family)
    owned: dict[str, list[np.ndarray[Any, Any]]] = {}
    space = NeuronSpace.from_model(model, kinds)
    for site in space.sites:
        for part in site.parts:
            owned.setdefault(part.module, []).append(part.positions(np.arange(site.size)).ravel())
    rows = space.all().rows()
    for name, positions in owned.items():
        dim = storage_dim(model.get_submodule(name), rows[name].side)
        whole = np.arange(model.get_submodule(name).weight.shape[dim])
        # A matrix that is touched is owned whole, each position once; ffn_in leaves the gate alone.
        assert np.array_equal(np.sort(np.concatenate(positions)), whole)
        assert np.array_equal(rows[name].positions, whole)


@torch.no_grad()
def zeroed(model: nn.Module, parts: tuple[Part, ...], neurons: Neurons, inputs: Any) -> torch.Tensor:
    """Logits with the neurons' rows and columns of `parts` set to zero; the model is given back as it was."""
    saved = {part.module: model.get_submodule(part.module).weight.clone() for part in parts}
    for part in parts:
        module = model.get_submodule(part.module)
        module.weight.index_fill_(
            storage_dim(module, part.side), torch.from_numpy(part.positions(neurons).ravel()), 0.0
        )
    result = logits(model, inputs)
    for name, weight in saved.items():
        model.get_submodule(name).weight.copy_(weight)
    return result


@contextmanager
def silenced(
    module: nn.Module,
    where: str,
    channels: Neurons,
    view: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Iterator[None]:
    """While the context lasts, these channels (of a view) of the module's input or output are zero."""

    def silence(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        view(changed)[..., torch.from_numpy(channels)] = 0
        return changed

    if where == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: (silence(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: silence(output))
    try:
        yield
    finally:
        handle.remove()


def assert_ablates(model: PreTrainedModel, site: Site, neurons: Neurons, expected: torch.Tensor) -> None:
    """Zeroing each part alone, and all parts together, gives the expected logits, which are not the model's own."""
    inputs = batch(model)
    untouched = logits(model, inputs)
    assert (untouched - expected).abs().max() > 1e-3
    for parts in [*((part,) for part in site.parts), site.parts]:
        torch.testing.assert_close(zeroed(model, parts, neurons, inputs), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, inputs), untouched)


#: Where the activations of a feed-forward block are read, from transformers' code.
DOWN = {"bert": "output.dense", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2"}
DOWN |= dict.fromkeys(("t5", "t5_gated"), "DenseReluDense.wo")


@pytest.mark.parametrize("kind", ["ffn", "ffn_in", "ffn_out"])
def test_each_part_of_a_feed_forward_neuron_carries_its_activation(
    family: str, lively: PreTrainedModel, kind: Kind
) -> None:
    neurons = np.array([3, 17, 40])
    for site in NeuronSpace.from_model(lively, [kind]).sites:
        down = lively.get_submodule(site.name.removesuffix(kind) + DOWN.get(family, "mlp.down_proj"))
        with silenced(down, "input", neurons):
            expected = logits(lively, batch(lively))
        assert_ablates(lively, site, neurons, expected)


def projection(family: str, site: Site, role: int, head: int) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The module that computes a site's query (0), key (1) or value (2), and a view of one head of its output.

    Written from transformers' code, so that it is independent of the anatomies.
    """
    prefix = site.name.removesuffix(site.kind)

    def of_head(output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(-1, (-1, HEAD))[..., head, :]

    if family == "gpt2":
        return f"{prefix}attn.c_attn", lambda output: of_head(output.split(WIDTH, dim=-1)[role])
    if family == "gpt_neox":
        return (
            f"{prefix}attention.query_key_value",
            lambda output: output.unflatten(-1, (-1, 3, HEAD))[..., head, role, :],
        )
    if family == "bert":
        return f"{prefix}attention.self.{('query', 'key', 'value')[role]}", of_head
    if family.startswith("t5"):
        block = "EncDecAttention" if prefix.startswith("decoder") and ".layer.1." in prefix else "SelfAttention"
        return f"{prefix}{block}.{'qkv'[role]}", of_head
    return f"{prefix}self_attn.{'qkv'[role]}_proj", of_head


def check_channels(family: str, model: PreTrainedModel, kind: Kind, role: int, head: int, channels: list[int]) -> None:
    """The neurons of one head's channels do what silencing those channels of its keys or values does."""
    for site in NeuronSpace.from_model(model, [kind]).sites:
        name, view = projection(family, site, role, head)
        with silenced(model.get_submodule(name), "output", np.array(channels), view):
            expected = logits(model, batch(model))
        assert_ablates(model, site, head * HEAD + np.array(channels), expected)


@pytest.mark.parametrize("channels", [[0], [3, 6]], ids=str)
@pytest.mark.parametrize("head", [0, 1])
def test_each_part_of_an_attention_neuron_carries_its_channel(
    family: str, lively: PreTrainedModel, head: int, channels: list[int]
) -> None:
    check_channels(family, lively, "attention", VALUE, head, channels)


@pytest.mark.parametrize("head", [0, 1])
def test_each_part_of_a_query_key_neuron_carries_its_channel(family: str, lively: PreTrainedModel, head: int) -> None:
    # Qwen3 normalises each head's queries and keys, so that only a whole head is silenced from either side alike.
    check_channels(family, lively, "qk", KEY, head, list(range(HEAD)) if family == "qwen3" else UNMIXED)


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_a_biased_neuron_is_silent_without_its_columns(family: str, lively: PreTrainedModel, kind: Kind) -> None:
    """Biases are no part of a neuron, and what they leave of its activation goes nowhere."""
    with torch.no_grad():
        for name, parameter in lively.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.3)
    inputs, neurons = batch(lively), np.array([1, 6, 9])
    for site in NeuronSpace.from_model(lively, [kind]).sites:
        columns = tuple(part for part in site.parts if part.side == "column")
        silent = zeroed(lively, columns, neurons, inputs)
        assert (silent - logits(lively, inputs)).abs().max() > 1e-3
        torch.testing.assert_close(zeroed(lively, site.parts, neurons, inputs), silent, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """A model of no known family: two feed-forward layers, as its author would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"grow": nn.Linear(6, 10), "shrink": nn.Linear(10, 6)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["shrink"](torch.relu(layer["grow"](x)))
        return x


class NetConfig:
    model_type = "net"


def test_an_unknown_family_shows_how_to_describe_it() -> None:
    with pytest.raises(InputError, match="model family 'net' is not known") as caught:
        anatomy_of("net")
    assert "neurons:\n    ffn: [{up: mlp.up_proj" in str(caught.value)
    assert "llama" in str(caught.value)
    shown = yaml.safe_load(str(caught.value).split(":\n", 1)[1])
    assert TypeAdapter(Anatomy).validate_python(shown["model"]["neurons"]).ffn[0].down == "mlp.down_proj"


@pytest.mark.parametrize("with_config", [True, False])
def test_an_anatomy_makes_an_unknown_model_work(with_config: bool) -> None:
    net = Net()
    if with_config:
        net.config = NetConfig()
    with pytest.raises(InputError, match="is not known"):
        NeuronSpace.from_model(net)
    anatomy = Anatomy(ffn=(FeedForward(up="grow", down="shrink"),))
    space = NeuronSpace.from_model(net, anatomy=anatomy)
    assert [(site.name, site.size) for site in space.sites] == [("layers.0.ffn", 10), ("layers.1.ffn", 10)]
    x = torch.randn(3, 6)
    neurons = NeuronSet(space, {"layers.1.ffn": [2, 7]})
    with silenced(net.layers[1]["shrink"], "input", np.array([2, 7])):
        expected = net(x)
    for name, rows in Overlay.read(net, neurons).values.items():
        assert rows.shape == (2, 6), name
    Overlay(neurons, {name: torch.zeros(2, 6) for name in neurons.rows()}).lay_on(net)
    torch.testing.assert_close(net(x), expected)


def test_an_anatomy_overrides_the_family() -> None:
    anatomy = Anatomy(ffn=(FeedForward(up="mlp.up_proj", down="mlp.down_proj"),))
    space = NeuronSpace.from_model(tiny_model("llama"), anatomy=anatomy)
    assert {site.neuron_parameters for site in space.sites} == {2 * WIDTH}


SWAPPED = Attention(
    query="self_attn.k_proj", key="self_attn.q_proj", value="self_attn.v_proj", output="self_attn.o_proj"
)


@pytest.mark.parametrize(
    ("anatomy", "kind", "message"),
    [
        (Anatomy(attention=ANATOMIES["llama"].attention), "ffn", "no neurons of kind 'ffn'"),
        (Anatomy(ffn=ANATOMIES["llama"].ffn), "qk", "no neurons of kind 'qk'"),
        (Anatomy(ffn=(FeedForward(up="mlp.up", down="mlp.down"),)), "ffn", "no neurons of kind 'ffn'"),
        (
            Anatomy(ffn=(FeedForward(up="mlp.up_proj", down="self_attn.o_proj"),)),
            "ffn",
            "are not one block",
        ),
        (
            Anatomy(ffn=(FeedForward(up="mlp.up_proj", gate="mlp.down_proj", down="mlp.down_proj"),)),
            "ffn",
            "not its gate",
        ),
        (Anatomy(attention=(SWAPPED,)), "attention", "do not make up"),
        (Anatomy(attention=(Attention(fused="self_attn.q_proj", output="self_attn.o_proj"),)), "qk", "three times"),
        (Anatomy(ffn=(FeedForward(up="input_layernorm", down="mlp.down_proj"),)), "ffn", "no weight matrix"),
    ],
)
def test_an_anatomy_that_does_not_fit_is_refused(anatomy: Anatomy, kind: Kind, message: str) -> None:
    with pytest.raises(InputError, match=message):
        NeuronSpace.from_model(tiny_model("llama"), [kind], anatomy)


@pytest.mark.parametrize(
    "wrong", [{"ffn": [{"up": "a"}]}, {"ffn": [{"up": "a", "down": "b", "gat": "c"}]}, {"mlp": []}]
)
def test_a_misspelt_anatomy_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TypeAdapter(Anatomy).validate_python(wrong)
