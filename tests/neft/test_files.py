"""Files are written whole or not at all, and what is broken is said in one sentence."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neft.errors import FailedError, InputError, NeftError
from neft.files import load_tensors, save_tensors, written_folder, written_whole

TENSORS = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)}
DESCRIPTION = {"words": ["eins", "zwei"], "number": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "file.safetensors"
    save_tensors(path, "neft-test", TENSORS, DESCRIPTION)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_and_description_come_back(saved: Path) -> None:
    tensors, description = load_tensors(saved, "neft-test")
    assert description == DESCRIPTION
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_nothing_else_is_left_beside_the_file(saved: Path) -> None:
    assert names(saved.parent) == ["file.safetensors"]
    assert stat.S_IMODE(saved.stat().st_mode) == 0o644


def test_tensors_that_are_views_or_need_gradients_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    save_tensors(tmp_path / "file", "neft-test", {"column": whole[:, 1], "turned": whole.T}, {})
    tensors, _ = load_tensors(tmp_path / "file", "neft-test")
    assert torch.equal(tensors["column"], whole.detach()[:, 1])
    assert torch.equal(tensors["turned"], whole.detach().T)


def test_equal_content_gives_equal_bytes(saved: Path, tmp_path: Path) -> None:
    save_tensors(tmp_path / "again", "neft-test", dict(reversed(TENSORS.items())), dict(reversed(DESCRIPTION.items())))
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file: .*nothing \(a neft-test was expected there\)"):
        load_tensors(tmp_path / "nothing", "neft-test")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path, "neft-test")


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_a_truncated_file_is_corrupt(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(FailedError, match=r"is corrupt .*restore it from a copy"):
        load_tensors(saved, "neft-test")


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        saved.write_bytes(changed)
        with pytest.raises(NeftError):
            load_tensors(saved, "neft-test")
    saved.write_bytes(content)
    assert load_tensors(saved, "neft-test")[1] == DESCRIPTION


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        (None, InputError, "'foreign safetensors file', not a 'neft-test'"),
        ({"format": "pt"}, InputError, "'foreign safetensors file', not a 'neft-test'"),
        ({"neft": json.dumps({"format": "neft-other"})}, InputError, "'neft-other', not a 'neft-test'"),
        ({"neft": json.dumps({"format": "neft-test"})}, FailedError, "is corrupt"),
        ({"neft": "{"}, FailedError, "is corrupt"),
        ({"neft": "[]"}, FailedError, "is corrupt"),
    ],
)
def test_a_foreign_file_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None, error: type[NeftError], message: str
) -> None:
    save_file(TENSORS, tmp_path / "foreign", metadata=metadata)
    with pytest.raises(error, match=message):
        load_tensors(tmp_path / "foreign", "neft-test")


def test_text_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the old red fox " * 10)
    with pytest.raises(FailedError, match="is corrupt"):
        load_tensors(tmp_path / "text", "neft-test")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that takes no more when a file is to be made durable."""

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    yield


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "file"
    if existing:
        path.write_text("old")
    with pytest.raises(FailedError, match=r"cannot write .*file: .*No space left on device; free some space"):
        save_tensors(path, "neft-test", TENSORS, {})
    assert names(tmp_path) == (["file"] if existing else [])
    assert not existing or path.read_text() == "old"


@pytest.mark.parametrize("writing", [written_whole, written_folder])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, writing: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FailedError, match=r"cannot write .*file/inside"), writing(tmp_path / "file" / "inside"):
        raise AssertionError("never reached")


@pytest.mark.parametrize("error", [ValueError("mistake"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), written_whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(type(error)), written_folder(tmp_path / "folder") as temporary:
        (temporary / "part").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with written_folder(tmp_path / "deep" / "folder") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "one").read_text() == "1"
    assert names(tmp_path / "deep") == ["folder"]


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("keep")
    with pytest.raises(FailedError, match="cannot write"), written_folder(tmp_path / "folder") as temporary:
        (temporary / "other").write_text("1")
    assert names(tmp_path / "folder") == ["mine"]
    assert names(tmp_path) == ["folder"]
