"""Checkout: every past state bit for bit, or a refusal that says why."""

from __future__ import annotations

import shutil

import pytest

from neft.errors import FailedError, InputError
from neft.models import load_base


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
