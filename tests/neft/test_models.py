"""Base models are loaded from folders and GGUF files, and what cannot be loaded is said in one sentence."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from neft import InputError, NeuronSpace
from neft.audit import base_fingerprint
from neft.models import load_base
from tests.neft.helpers import differing, logits, state
from tests.tiny import CAUSAL, WORDS, batch, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model and its tokenizer, as `save_pretrained` writes them."""
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", CAUSAL)
def test_a_folder_is_loaded_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_base(str(tmp_path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert differing(state(model), state(loaded)) == []
    assert torch.equal(logits(loaded, batch(model)), logits(model, batch(model)))


def test_the_tokenizer_comes_with_the_model(folder: Path) -> None:
    assert load_base(str(folder))[1]("red fox").input_ids == tiny_tokenizer()("red fox").input_ids


def test_threads_that_load_at_once_leave_transformers_as_it_was(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = [model for model, _ in pool.map(lambda _: load_base(str(folder)), range(8))]
    assert len({base_fingerprint(model) for model in loaded}) == 1
    model = tiny_model("gpt2")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_asked_dtype(folder: Path, dtype: str) -> None:
    loaded, _ = load_base(str(folder), dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_base(str(folder))[1].pad_token == "</s>"


def test_a_tokenizer_with_neither_is_refused(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"model.name '{name}': there is no such folder"):
        load_base(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        load_base(str(tmp_path))


def test_an_unreachable_hub_id_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.name 'nobody/nothing' cannot be loaded: .*give a hub id"):
        load_base("nobody/nothing")


def test_a_family_that_continues_no_text_is_refused(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"the old red fox"])
def test_broken_files_are_refused(folder: Path, broken: str, content: bytes) -> None:
    (folder / broken).write_bytes(content)
    with pytest.raises(InputError, match=r"model\.name"):
        load_base(str(folder))


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(folder))


def test_weights_that_are_not_all_there_are_refused(folder: Path) -> None:
    """transformers would fill them with random numbers."""
    model = tiny_model()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(folder, state_dict=kept)
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    with pytest.raises(InputError, match=r"lacks .*layers\.1\.mlp\.up_proj\.weight"):
        load_base(str(folder))


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A tiny Llama with tied embeddings as a GGUF file, written by the format's own library."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(WORDS))
    writer.add_token_types([1] * len(WORDS))
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(WORDS), 32), "output_norm.weight": (32,)}
    for name, shape in named.items():
        writer.add_tensor(name, torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_plain_model_that_can_be_saved(gguf_file: Path, tmp_path: Path) -> None:
    loaded, tokenizer = load_base(str(gguf_file))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert len(NeuronSpace.from_model(loaded)) == 64
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = load_base(str(tmp_path / "saved"))
    assert base_fingerprint(again) == base_fingerprint(loaded)
    inputs = batch(loaded)
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such GGUF file"):
        load_base(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"the old red fox" * 100])
def test_a_broken_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as GGUF"):
        load_base(str(tmp_path / "model.gguf"))
