"""Where each model family keeps its neurons: module names, relative to a layer, for every kind of neuron.

A family not listed here is described in the config under `model.neurons`, in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from neft.errors import InputError

Fusion = Literal["stacked", "per_head"]


# Plain dataclasses, which a config validates all the same: the tuner runs where pydantic is not installed.
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """One feed-forward block: the modules whose rows and columns make up its neurons."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    up: str = field(metadata={"help": "module whose row i feeds neuron i, as its name ends: `mlp.up_proj`, `fc1`"})
    down: str = field(metadata={"help": "module whose column i neuron i writes through: `mlp.down_proj`, `fc2`"})
    gate: str | None = field(
        default=None, metadata={"help": "module whose row i gates neuron i, where the block has a gate"}
    )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention block: separate query, key and value modules, or one fused module."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    output: str = field(metadata={"help": "module that mixes the heads: `self_attn.o_proj`"})
    query: str | None = field(default=None, metadata={"help": "query module, when separate"})
    key: str | None = field(default=None, metadata={"help": "key module, when separate"})
    value: str | None = field(default=None, metadata={"help": "value module, when separate"})
    fused: str | None = field(default=None, metadata={"help": "one module for query, key and value"})
    fusion: Fusion = field(
        default="stacked",
        metadata={
            "help": "rows of the fused module: `stacked` (all queries, all keys, all values) or `per_head`",
        },
    )
    head_dim: int | None = field(
        default=None, metadata={"help": "channels a head; taken from the model's config when absent"}
    )

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: neither a fused module nor all three, or a head without channels.
        """
        if len(self.inputs) != (1 if self.fused else 3):
            raise InputError("an attention block needs either `fused`, or all of `query`, `key` and `value`")
        if self.head_dim is not None and self.head_dim < 1:
            raise InputError(f"head_dim is {self.head_dim}; a head has at least one channel")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The modules that compute query, key and value: the fused one, or all three."""
        return tuple(name for name in (self.fused, self.query, self.key, self.value) if name)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Every place of one model family that holds neurons."""

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    ffn: tuple[FeedForward, ...] = field(
        default=(), metadata={"help": "feed-forward blocks, by the endings of their module names"}
    )
    attention: tuple[Attention, ...] = field(
        default=(), metadata={"help": "attention blocks, by the endings of their module names"}
    )


_LLAMA = Anatomy(
    ffn=(FeedForward(gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"),),
    attention=(
        Attention(
            query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.o_proj"
        ),
    ),
)
_GPT2 = Anatomy(
    ffn=(FeedForward(up="mlp.c_fc", down="mlp.c_proj"),),
    attention=(Attention(fused="attn.c_attn", fusion="stacked", output="attn.c_proj"),),
)
_GPT_NEOX = Anatomy(
    ffn=(FeedForward(up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),),
    attention=(Attention(fused="attention.query_key_value", fusion="per_head", output="attention.dense"),),
)
_OPT = Anatomy(
    ffn=(FeedForward(up="fc1", down="fc2"),),
    attention=(
        Attention(
            query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", output="self_attn.out_proj"
        ),
    ),
)
_BERT = Anatomy(
    ffn=(FeedForward(up="intermediate.dense", down="output.dense"),),
    attention=(
        Attention(
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            output="attention.output.dense",
        ),
    ),
)
_T5 = Anatomy(
    ffn=(
        FeedForward(up="DenseReluDense.wi", down="DenseReluDense.wo"),
        FeedForward(gate="DenseReluDense.wi_0", up="DenseReluDense.wi_1", down="DenseReluDense.wo"),
    ),
    attention=tuple(
        Attention(query=f"{block}.q", key=f"{block}.k", value=f"{block}.v", output=f"{block}.o")
        for block in ("SelfAttention", "EncDecAttention")
    ),
)

#: `model.config.model_type` -> where that family keeps its neurons.
ANATOMIES: dict[str, Anatomy] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "bert": _BERT,
    "t5": _T5,
}

_EXAMPLE = """model:
  neurons:
    ffn: [{up: mlp.up_proj, gate: mlp.gate_proj, down: mlp.down_proj}]
    attention: [{query: attn.q, key: attn.k, value: attn.v, output: attn.o, head_dim: 64}]"""


def anatomy_of(model_type: str) -> Anatomy:
    """The anatomy of a transformers model family.

    Raises:
        InputError: the family is not known; the message shows how to describe it in the config.
    """
    if model_type in ANATOMIES:
        return ANATOMIES[model_type]
    raise InputError(
        f"model family {model_type!r} is not known (known: {', '.join(sorted(ANATOMIES))}); name the modules that "
        f"hold its neurons, as their names end, in the config:\n{_EXAMPLE}"
    )
