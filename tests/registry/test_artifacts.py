"""The artifact store: files under the checksum of their content, in a folder and wherever fsspec reaches."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from neft.errors import FailedError, InputError
from registry.artifacts import Artifact, ArtifactStore, FolderStore, RemoteStore, open_store, relative_path

CONTENT = b"rows of numbers"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = f"{SHA256[:2]}/{SHA256}.safetensors"


@pytest.fixture(params=["folder", "remote"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return FolderStore(tmp_path / "artifacts")
    return RemoteStore(f"memory://{tmp_path}", cache=tmp_path / "cache")


@pytest.fixture
def folder_store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "artifacts")


@pytest.fixture
def remote_store(tmp_path: Path) -> RemoteStore:
    return RemoteStore(f"memory://{tmp_path}", cache=tmp_path / "cache")


def put(store: ArtifactStore, content: bytes = CONTENT) -> Artifact:
    return store.put("overlay", lambda path: path.write_bytes(content))


def damage(store: ArtifactStore, content: bytes | None) -> None:
    """Other content, or none, where the stored file was."""
    if isinstance(store, FolderStore):
        store.path(SHA256).unlink()
        if content is not None:
            store.path(SHA256).write_bytes(content)
    elif isinstance(store, RemoteStore):
        store._fs.rm_file(f"{store._root}/{PATH}")
        if content is not None:
            store._fs.pipe_file(f"{store._root}/{PATH}", content)


def test_a_file_lies_under_its_checksum(store):
    assert put(store) == put(store) == Artifact("overlay", SHA256, len(CONTENT))
    assert relative_path(SHA256) == PATH
    assert store.fetch(put(store), "sst2@1").read_bytes() == CONTENT
    assert [(stored.path, stored.sha256, stored.bytes) for stored in store.stored()] == [(PATH, SHA256, len(CONTENT))]


@pytest.mark.parametrize(
    ("damaged", "says"),
    [(CONTENT[:-1], "truncated, 14 of 15 bytes"), (b"r0ws of numbers", "was altered"), (None, "is missing")],
)
def test_putting_again_mends_a_damaged_file(store, damaged, says):
    artifact = put(store)
    damage(store, damaged)
    with pytest.raises(FailedError, match=f"the overlay of sst2@1, .*{says}.*restore the file from a copy"):
        store.fetch(artifact, "sst2@1")
    put(store)
    assert store.fetch(artifact, "sst2@1").read_bytes() == CONTENT


def test_a_writer_that_fails_leaves_nothing(store):
    def fail(path):
        path.write_bytes(CONTENT)
        raise OSError(28, "No space left on device")

    with pytest.raises(FailedError, match=r"cannot write the overlay to .*No space left"):
        store.put("overlay", fail)
    assert list(store.stored()) == []


def test_what_is_removed_is_gone(store):
    artifact = put(store)
    (stored,) = store.stored()
    store.remove(stored)
    store.remove(stored)
    assert list(store.stored()) == []
    with pytest.raises(FailedError, match="is missing"):
        store.fetch(artifact, "sst2@1")


def test_what_has_no_name_of_the_stores_is_told_apart(folder_store):
    put(folder_store)
    others = (f"00/{SHA256}.safetensors", "notes.txt", ".incoming-x/overlay.safetensors", f"{PATH}.part")
    for other in others:
        folder_store.root.joinpath(other).parent.mkdir(exist_ok=True)
        folder_store.root.joinpath(other).write_text("x")
    found = {stored.path: stored.sha256 for stored in folder_store.stored()}
    assert found == {PATH: SHA256} | dict.fromkeys(others)
    for stored in folder_store.stored():
        if stored.sha256 is None:
            folder_store.remove(stored)
    assert [stored.path for stored in folder_store.stored()] == [PATH]
    assert not folder_store.root.joinpath(".incoming-x").exists()


def test_a_store_is_listed_while_others_write(folder_store):
    """A file that is written is renamed three times: none of its passing names may stop a listing."""
    written, failures = threading.Event(), []

    def write() -> None:
        try:
            for number in range(60):
                put(folder_store, str(number).encode())
        except Exception as error:  # noqa: BLE001 - told by the test below
            failures.append(error)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not written.is_set():
        list(folder_store.stored())
    writer.join()
    assert failures == []
    assert len({stored.sha256 for stored in folder_store.stored()}) == 60


def test_a_fetched_file_is_kept_and_checked_each_time(remote_store):
    artifact = put(remote_store)
    local = remote_store.fetch(artifact, "sst2@1")
    damage(remote_store, None)
    assert remote_store.fetch(artifact, "sst2@1") == local  # it is here already
    local.write_bytes(b"altered")
    with pytest.raises(FailedError, match="is missing"):
        remote_store.fetch(artifact, "sst2@1")
    put(remote_store)
    assert remote_store.fetch(artifact, "sst2@1").read_bytes() == CONTENT


@pytest.mark.parametrize("step", ["put_file", "mv"])
def test_a_remote_store_that_fails_shows_nothing_under_a_name(remote_store, monkeypatch, step):
    def fail(*arguments: object, **named: object) -> None:
        raise ConnectionError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(remote_store._fs, step, fail)
        with pytest.raises(FailedError, match=r"cannot write the overlay to memory://.*: the network is gone"):
            put(remote_store)
    assert [stored.sha256 for stored in remote_store.stored() if stored.sha256] == []
    artifact = put(remote_store)
    with monkeypatch.context() as patch:
        patch.setattr(remote_store._fs, "get_file", fail)
        with pytest.raises(FailedError, match=r"the overlay of sst2@1, memory://.* cannot be .*: the network is gone"):
            remote_store.fetch(artifact, "sst2@1")
    assert remote_store.fetch(artifact, "sst2@1").read_bytes() == CONTENT


def test_stores_by_url(tmp_path):
    put(open_store(f"file://{tmp_path}/files"))
    assert open_store(tmp_path / "files").fetch(Artifact("overlay", SHA256, len(CONTENT)), "sst2@1").exists()
    for url, says in (("ghost://bucket", "Protocol not known"), ("smb://host/share", "smbprotocol")):
        with pytest.raises(InputError, match=rf"artifact store '{url}' cannot be reached: .*{says}"):
            open_store(url)
