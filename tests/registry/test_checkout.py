"""Checkout: every past state bit for bit, or a refusal that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from neft.audit import state_digest
from neft.errors import FailedError, InputError
from neft.models import load_base
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def learnt(pupil, keep):
    """Three tasks in a chain, with overlapping sets, and the weights as they stood after each."""
    return [(pupil.record(task), keep(pupil.model)) for task in ("sst2", "qnli", "sst2")]


def overlay_path(folder, entry):
    sha256 = entry.overlay_file.sha256
    return folder / "artifacts" / sha256[:2] / f"{sha256}.safetensors"


def test_every_state_comes_back_bit_for_bit(registry, learnt, is_same):
    for entry, weights in learnt:
        model, tokenizer = registry.checkout(entry)
        assert is_same(model, weights)
        assert len(tokenizer) == 64
    assert is_same(registry.checkout("sst2@1")[0], learnt[0][1])
    assert is_same(registry.checkout("sst2", 2)[0], learnt[2][1])
    assert not is_same(registry.checkout("qnli")[0], learnt[2][1])


def test_a_base_model_that_has_moved(registry, learnt, is_same, base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    assert is_same(registry.checkout("qnli", base=moved)[0], learnt[1][1])
    with pytest.raises(InputError, match=r"base model of qnli@1 .* `base`.*no such folder"):
        registry.checkout("qnli", base=tmp_path / "nowhere")


def test_another_base_model_is_refused_untouched(registry, learnt, other_base, keep, is_same):
    with pytest.raises(InputError, match="qnli@1 was learnt on base model"):
        registry.checkout("qnli", base=other_base)
    model, _ = load_base(str(other_base))
    before = keep(model)
    with pytest.raises(InputError, match="give that base model"):
        registry.lay_on(learnt[1][0], model)
    assert is_same(model, before)


def test_an_altered_overlay_is_refused(registry, learnt, folder):
    path = overlay_path(folder, learnt[0][0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FailedError, match=f"overlay of sst2@1, {path}, was altered.*learn the task again"):
        registry.checkout("qnli")


def test_a_truncated_overlay_is_refused(registry, learnt, folder):
    path = overlay_path(folder, learnt[1][0])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FailedError, match=f"overlay of qnli@1, {path}, is truncated"):
        registry.checkout("qnli")
    registry.checkout("sst2@1")


def test_a_missing_overlay_is_refused(registry, learnt, folder):
    path = overlay_path(folder, learnt[1][0])
    path.unlink()
    with pytest.raises(FailedError, match=f"overlay of qnli@1, {path}, is missing"):
        registry.checkout("sst2")


def test_a_state_that_is_not_the_recorded_one_is_refused(registry, pupil, base, keep, is_same):
    entry = pupil.record("sst2", state_digest="0" * 64)
    learnt = keep(pupil.model)
    model, _ = load_base(str(base))
    before = keep(model)
    with pytest.raises(FailedError, match="sst2@1 cannot be rebuilt"):
        registry.lay_on(entry, model)
    assert is_same(model, before)
    assert is_same(registry.checkout(entry, verify=False)[0], learnt)


# --- folders ---


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_transformers_loads_holds_every_weight(registry, learnt, is_same, tmp_path):
    for entry, weights in learnt:
        folder = tmp_path / entry.reference
        assert registry.write_model(entry.reference, folder) == entry
        assert is_same(AutoModelForCausalLM.from_pretrained(folder), weights)
        assert len(AutoTokenizer.from_pretrained(folder)) == 64
    assert leftovers(tmp_path) == ["qnli@1", "registry", "sst2@1", "sst2@2"]


def test_an_adapter_folder_alone_gives_the_state_back(registry, learnt, is_same, base, keep, tmp_path):
    """Later overlays win where sets overlap, and turning the adapter off gives back the base."""
    plain = keep(load_base(str(base))[0])
    for entry, weights in learnt:
        folder = tmp_path / entry.reference
        registry.write_adapter(entry, folder)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(leftovers(folder))
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "NEFT"
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert adapted.num_parameters() < sum(tensor.numel() for tensor in plain.values()) + 30 * 3 * 32
        ids = torch.arange(8)[None]
        expected, _ = registry.checkout(entry)
        with torch.no_grad():
            assert torch.equal(adapted(input_ids=ids).logits, expected(input_ids=ids).logits)
        assert is_same(adapted.merge_and_unload(), weights)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        assert is_same(adapted.unload(), plain)
    assert leftovers(tmp_path) == ["qnli@1", "registry", "sst2@1", "sst2@2"]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bfloat16"), ("gpt2", "float32"), ("gpt_neox", "bfloat16"), ("gemma2", "float32")]
)
def test_families_and_dtypes_go_through_both_folders(registry, new_pupil, family, dtype, tmp_path):
    """Tied weights, weights stored the other way round, fused ones; two kinds of neurons."""
    tiny_model(family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    pupil = new_pupil(registry, tmp_path / "base", dtype=dtype, kinds=["ffn", "attention"])
    for _ in range(2):
        entry = pupil.record("sst2")
    registry.write_model("sst2", tmp_path / "model")
    registry.write_adapter("sst2", tmp_path / "adapter")
    assert state_digest(load_base(str(tmp_path / "model"), dtype)[0]) == entry.state_digest
    plain, _ = load_base(str(tmp_path / "base"), dtype)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert state_digest(adapted.merge_and_unload()) == entry.state_digest


@pytest.mark.parametrize("write", ["write_model", "write_adapter"])
def test_a_folder_that_is_there_is_refused_untouched(registry, learnt, write, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="there exists already; name a new one"):
        getattr(registry, write)("qnli", tmp_path / "there")
    assert leftovers(tmp_path) == ["registry", "there"]
    assert leftovers(tmp_path / "there") == []


@pytest.mark.parametrize("write", ["write_model", "write_adapter"])
def test_another_base_model_leaves_no_folder(registry, learnt, write, other_base, tmp_path):
    with pytest.raises(InputError, match="qnli@1 was learnt on base model"):
        getattr(registry, write)("qnli", tmp_path / "out", base=other_base)
    assert leftovers(tmp_path) == ["registry"]


@pytest.mark.parametrize(
    ("write", "file"), [("write_model", "model.safetensors"), ("write_adapter", "adapter_model.safetensors")]
)
def test_what_is_not_on_the_disk_as_it_was_written_is_refused(registry, learnt, write, file, tmp_path, monkeypatch):
    """One bit of one weight, changed behind the back of what writes the folder."""
    kind = PreTrainedModel if write == "write_model" else PeftModel
    save = kind.save_pretrained

    def spoil(self, folder, **options):
        save(self, folder, **options)
        tensors = load_file(Path(folder) / file)
        name = max(each for each in tensors if "rows" in each or "up_proj" in each)
        tensors[name].view(-1).view(torch.int32)[0] ^= 1
        save_file(tensors, Path(folder) / file, metadata={"format": "pt"})

    monkeypatch.setattr(kind, "save_pretrained", spoil)
    with pytest.raises(FailedError, match=r"sst2@2 cannot be rebuilt: .*cannot be read back; try another disk"):
        getattr(registry, write)("sst2", tmp_path / "out")
    assert leftovers(tmp_path) == ["registry"]
