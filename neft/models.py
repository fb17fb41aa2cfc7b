"""Base models: loaded by hub id, local folder or GGUF file, with their tokenizers."""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from neft.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]

#: What transformers raises for files that are missing, broken, or of no known family.
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, struct.error)

#: While it loads a model, transformers changes its own classes: two threads that load at once may leave them changed,
#: so that weights are no longer tied in any model after.
_LOADING = threading.Lock()


def load_base(name: str, dtype: Dtype = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode, on the CPU.

    Args:
        name: a hub id, a folder written by `save_pretrained`, or a `.gguf` file.
        dtype: the dtype of the weights in memory.

    Raises:
        InputError: nothing can be loaded from `name`.
    """
    path = Path(name)
    if name.endswith(".gguf"):
        return _load_gguf(path, dtype)
    _refuse_missing(name, path)
    try:
        model, found = _model_and_report(name, dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except _UNREADABLE as error:
        raise InputError(
            f"model.name {name!r} cannot be loaded: {_first_line(error)}; give a hub id, a folder written by "
            "save_pretrained, or a .gguf file"
        ) from error
    _refuse_incomplete(name, found)
    return _ready(model, tokenizer)


def _model_and_report(source: str | Path, dtype: Dtype, **options: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    with _LOADING:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    model, report = loaded
    return model, report


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_incomplete(name: str, found: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers; such a model is nobody's base."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(
            f"model.name {name!r} lacks {len(missing)} weights of its model, such as {missing[0]}; "
            "give a complete checkpoint of a causal language model"
        )


def _refuse_missing(name: str, path: Path) -> None:
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.exists():
        raise InputError(f"model.name {name!r}: there is no such folder; give a hub id, a local folder or a .gguf file")
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(f"model.name {name!r}: the folder holds no config.json, so it is not a transformers model")


def _load_gguf(path: Path, dtype: Dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file into a plain model, which, unlike transformers' own object, can be saved."""
    if not path.is_file():
        raise InputError(f"model.name {str(path)!r}: there is no such GGUF file")
    try:
        loaded, found = _model_and_report(path.parent, dtype, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except _UNREADABLE as error:
        raise InputError(f"model.name {str(path)!r} cannot be read as GGUF: {_first_line(error)}") from error
    _refuse_incomplete(str(path), found)
    config = AutoConfig.for_model(**_without_quantization(loaded.config.to_dict()))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return _ready(model, tokenizer)


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _ready(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError("the model's tokenizer has neither a padding nor an end token; set one and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
