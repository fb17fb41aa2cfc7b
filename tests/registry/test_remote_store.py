"""A store behind fsspec: the same promises as a folder's, on fsspec's own store in memory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest

from neft.errors import FailedError, InputError
from registry import Registry
from registry.artifacts import Artifact, FolderStore, RemoteStore, open_store
from tests.registry.postgres import new_database

CONTENT = b"rows of numbers"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f"{SHA256[:2]}/{SHA256}.safetensors"


@pytest.fixture
def url() -> Iterator[str]:
    """A place of its own in the memory of this process."""
    name = f"/neft-{uuid.uuid4().hex}"
    yield f"memory:/{name}"
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture
def store(url: str, tmp_path: Path) -> RemoteStore:
    return RemoteStore(url, tmp_path / "cache")


def put(store: RemoteStore) -> Artifact:
    return store.put("overlay", lambda path: path.write_bytes(CONTENT))


def write(url: str, name: str, content: bytes) -> None:
    """Write behind the store's back."""
    with fsspec.open(f"{url}/{name}", "wb") as file:
        file.write(content)


def test_the_kind_of_store_follows_from_where_it_is(url, tmp_path):
    assert isinstance(open_store(tmp_path), FolderStore)
    assert isinstance(open_store(f"file://{tmp_path}"), FolderStore)
    assert isinstance(open_store(url), RemoteStore)
    with pytest.raises(InputError, match=r"artifact store 'nowhere://x' cannot be reached"):
        open_store("nowhere://x")


def test_a_file_lies_under_its_checksum(store, tmp_path):
    assert put(store) == put(store) == Artifact("overlay", SHA256, len(CONTENT))
    [stored] = store.stored()
    assert (stored.path, stored.sha256, stored.bytes) == (NAME, SHA256, len(CONTENT))
    assert timedelta(0) <= datetime.now(UTC) - stored.written_at < timedelta(minutes=1)
    path = store.fetch(put(store), "sst2@1")
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == CONTENT


def test_what_was_fetched_is_fetched_once_and_again_when_it_is_damaged(store, url):
    artifact = put(store)
    path = store.fetch(artifact, "sst2@1")
    path.write_bytes(CONTENT[:-1])
    assert store.fetch(artifact, "sst2@1").read_bytes() == CONTENT
    store._fs.rm_file(f"{store._root}/{NAME}")
    assert store.fetch(artifact, "sst2@1") == path
    path.unlink()
    with pytest.raises(FailedError, match=f"the overlay of sst2@1, {url}/{NAME}, is missing"):
        store.fetch(artifact, "sst2@1")
    assert not path.exists()


@pytest.mark.parametrize(
    ("damaged", "fault", "says"),
    [
        (CONTENT[:-1], "truncated", "is truncated, 14 of 15 bytes"),
        (b"r0ws of numbers", "altered", "was altered"),
        (CONTENT + b"!", "altered", "was altered"),
    ],
)
def test_a_damaged_file_is_refused_and_putting_again_mends_it(store, url, damaged, fault, says):
    artifact = put(store)
    assert store.fault(artifact, deep=True) is None
    write(url, NAME, damaged)
    with pytest.raises(FailedError, match=f"the overlay of sst2@1, {url}/{NAME}, {says}"):
        store.fetch(artifact, "sst2@1")
    assert list((store._cache).rglob("*.safetensors*")) == []
    assert store.fault(artifact, deep=True) == fault
    assert store.fault(artifact, deep=False) == (None if len(damaged) == len(CONTENT) else fault)
    put(store)
    assert store.fetch(artifact, "sst2@1").read_bytes() == CONTENT


def test_a_fault_is_the_stores_whatever_the_cache_has(store):
    artifact = put(store)
    store.fetch(artifact, "sst2@1")
    [stored] = store.stored()
    assert store.remove(stored) is True
    assert store.remove(stored) is False
    assert list(store.stored()) == []
    assert store.fault(artifact, deep=False) == store.fault(artifact, deep=True) == "missing"


def test_what_was_written_again_is_not_removed(store):
    put(store)
    [stored] = store.stored()
    put(store)
    assert store.remove(stored) is False
    assert [each.path for each in store.stored()] == [NAME]


def test_a_writer_that_fails_leaves_nothing(store, url):
    def fail(path: Path) -> None:
        path.write_bytes(CONTENT)
        raise OSError(28, "No space left on device")

    with pytest.raises(FailedError, match=f"cannot write the overlay to {url}: .*No space left"):
        store.put("overlay", fail)
    assert list(store.stored()) == []


def test_what_others_left_is_listed_without_a_checksum(store, url):
    put(store)
    write(url, ".incoming-1234", b"half")
    write(url, "readme.txt", b"mine")
    assert [(each.path, each.sha256) for each in store.stored()] == [
        (".incoming-1234", None),
        (NAME, SHA256),
        ("readme.txt", None),
    ]


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_registry_with_a_remote_store(url, database, base, new_pupil, tmp_path, monkeypatch):
    """From recording to checkout, forgetting, export, verify and gc."""
    monkeypatch.setenv("NEFT_CACHE", str(tmp_path / "cache"))
    if database == "sqlite":
        use(Registry.open(url=f"sqlite:///{tmp_path / 'registry.db'}", artifacts=url), url, base, new_pupil, tmp_path)
        return
    with new_database() as address:
        use(Registry.open(url=address, artifacts=url), url, base, new_pupil, tmp_path)


def use(registry: Registry, url: str, base: Path, new_pupil, tmp_path: Path) -> None:
    pupil = new_pupil(registry, base)
    films = pupil.record("films", neurons=pupil.of(0, 1))
    news = pupil.record("news", neurons=pupil.of(2))
    expected = {name: tensor.clone() for name, tensor in pupil.model.state_dict().items()}
    model, _ = registry.checkout("news")
    assert all(bool((tensor == expected[name]).all()) for name, tensor in model.state_dict().items())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    gone = registry.forget("films")
    registry.write_model(gone, tmp_path / "model")
    registry.export(gone, tmp_path / "films.zip")
    other = Registry.open(tmp_path / "other")
    assert other.import_(tmp_path / "films.zip").reference == "films@2"
    other.close()
    assert registry.import_(tmp_path / "films.zip") == gone

    assert registry.verify().whole
    write(url, ".incoming-1234", b"half")
    assert [each.kind for each in registry.verify().orphans] == ["half-written"]
    assert registry.gc().orphans == ()
    assert [each.path for each in registry.gc(older_than=timedelta(0)).orphans] == [".incoming-1234"]
    write(url, f"{films.overlay_file.sha256[:2]}/{films.overlay_file.sha256}.safetensors", b"other")
    [problem] = registry.verify(deep=False).problems
    assert (problem.fault, problem.entries) == ("truncated", ("films@1",))
    assert registry.get("news") == news
    registry.close()


def test_looking_up_imports_no_fsspec(folder, pupil):
    """A registry in a folder starts without it."""
    pupil.record("films")
    program = "import sys\nfrom registry import Registry\nRegistry.open(sys.argv[1]).get('films')\n"
    program += "sys.exit('fsspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, str(folder)], check=False).returncode == 0
