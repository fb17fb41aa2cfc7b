"""The artifact store: files under the checksum of their content."""

from __future__ import annotations

import hashlib

import pytest

from neft.errors import FailedError
from registry.artifacts import Artifact, FolderStore

CONTENT = b"rows of numbers"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "artifacts")


def put(store):
    return store.put("overlay", lambda path: path.write_bytes(CONTENT))


def test_a_file_lies_under_its_checksum(store):
    assert put(store) == put(store) == Artifact("overlay", SHA256, len(CONTENT))
    path = store.root / SHA256[:2] / f"{SHA256}.safetensors"
    assert store.fetch(put(store), "sst2@1") == path
    assert path.read_bytes() == CONTENT
    assert [file for file in store.root.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    ("damaged", "says"), [(CONTENT[:-1], "truncated, 14 of 15 bytes"), (b"r0ws of numbers", "was altered")]
)
def test_putting_again_mends_a_damaged_file(store, damaged, says):
    artifact = put(store)
    store.path(SHA256).write_bytes(damaged)
    with pytest.raises(FailedError, match=f"the overlay of sst2@1, .*{says}"):
        store.fetch(artifact, "sst2@1")
    put(store)
    assert store.fetch(artifact, "sst2@1").read_bytes() == CONTENT


def test_a_writer_that_fails_leaves_nothing(store):
    def fail(path):
        path.write_bytes(CONTENT)
        raise OSError(28, "No space left on device")

    with pytest.raises(FailedError, match=r"cannot write the overlay to .*No space left"):
        store.put("overlay", fail)
    assert list(store.root.iterdir()) == []
