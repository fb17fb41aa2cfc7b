"""The artifact store: safetensors files under the SHA-256 of their content, written whole or not at all.

A store is a folder, or any place that fsspec reaches by URL (`s3://bucket/path`, `gs://...`, with its driver
installed). The same content is stored once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from neft.errors import FailedError, InputError

_NAME = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})\.safetensors")
_INCOMING = ".incoming-"


@dataclass(frozen=True)
class Artifact:
    """A stored file: what it is (`overlay`, `scores`, ...), the SHA-256 of its content, and its size."""

    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Stored:
    """A file that lies in a store: its path there, the SHA-256 that its name says, its size, and when it was written.

    `sha256` is None for what a store does not name: what a kill has left half-written, or somebody else's file.
    """

    path: str
    sha256: str | None
    bytes: int
    written_at: datetime


class ArtifactStore(Protocol):
    """Where artifacts lie."""

    #: The store's folder or URL.
    name: str

    def put(self, name: str, save: Callable[[Path], None]) -> Artifact:
        """Store the file that `save` writes to the path it is given.

        A file that is already there is replaced by the same content, which mends it if it was damaged.

        Raises:
            FailedError: the disk is full or the store cannot be written; at most an unnamed temporary file is left.
        """
        ...

    def fetch(self, artifact: Artifact, owner: str) -> Path:
        """The local path of a stored file, after its size and checksum have been compared.

        Args:
            artifact: what to fetch.
            owner: the entry it belongs to, for the message.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        ...

    def stored(self) -> Iterator[Stored]:
        """Everything that lies in the store."""
        ...

    def remove(self, stored: Stored) -> None:
        """Remove a file; one that is gone already is no error."""
        ...


def open_store(location: str | os.PathLike[str]) -> ArtifactStore:
    """The store in a folder, or at a URL of fsspec's.

    Raises:
        InputError: fsspec does not know the URL's scheme, or its driver is not installed.
    """
    written = os.fspath(location)
    if "://" not in written:
        return FolderStore(Path(written))
    if written.startswith("file://"):
        return FolderStore(Path(written.removeprefix("file://")))
    return RemoteStore(written)


def relative_path(sha256: str) -> str:
    """Where in a store the file of that content lies."""
    return f"{sha256[:2]}/{sha256}.safetensors"


class FolderStore(ArtifactStore):
    """A folder of files `<sha256[:2]>/<sha256>.safetensors`."""

    def __init__(self, root: Path):
        self.root = root
        self.name = str(root)

    def path(self, sha256: str) -> Path:
        """Where the file of that content is, or would be."""
        return self.root / relative_path(sha256)

    def put(self, name: str, save: Callable[[Path], None]) -> Artifact:
        from neft.files import written_whole  # brings torch, which a look-up never needs

        with _reported(name, self.name):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=_INCOMING, dir=self.root) as folder:
                incoming = Path(folder) / f"{name}.safetensors"
                save(incoming)
                artifact = Artifact(name, _sha256(incoming), incoming.stat().st_size)
                with written_whole(self.path(artifact.sha256)) as temporary:
                    incoming.replace(temporary)
            _sync_folder(self.root)
        return artifact

    def fetch(self, artifact: Artifact, owner: str) -> Path:
        path = self.path(artifact.sha256)
        check(path, artifact, f"the {artifact.name} of {owner}, {path},")
        return path

    def stored(self) -> Iterator[Stored]:
        # A file may go while the folder is read: another process has put it in its place.
        for path in sorted(self.root.rglob("*")):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.is_file():
                relative = path.relative_to(self.root).as_posix()
                yield Stored(relative, _named(relative), status.st_size, _moment(status.st_mtime))

    def remove(self, stored: Stored) -> None:
        path = self.root / stored.path
        try:
            path.unlink(missing_ok=True)
            if path.parent.name.startswith(_INCOMING):
                shutil.rmtree(path.parent, ignore_errors=True)
        except OSError as error:
            raise FailedError(f"cannot remove {path}: {error}; mend its permissions and try again") from error


class RemoteStore(ArtifactStore):
    """A store that fsspec reaches. What is fetched is kept in a local folder, checked each time it is used."""

    def __init__(self, url: str, cache: Path | None = None):
        """
        Args:
            cache: where fetched files are kept; default: `NEFT_CACHE`, or `~/.cache/neft/artifacts`.

        Raises:
            InputError: fsspec does not know the scheme, or its driver is not installed.
        """
        import fsspec

        self.name = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.name)
        except (ValueError, ImportError) as error:
            raise InputError(f"artifact store {url!r} cannot be reached: {error}") from error
        self._cache = cache or Path(os.environ.get("NEFT_CACHE") or "~/.cache/neft/artifacts").expanduser()

    def put(self, name: str, save: Callable[[Path], None]) -> Artifact:
        with _reported(name, self.name), tempfile.TemporaryDirectory(prefix="neft-") as folder:
            incoming = Path(folder) / f"{name}.safetensors"
            save(incoming)
            artifact = Artifact(name, _sha256(incoming), incoming.stat().st_size)
            # An object store shows a file only when all of it is there; elsewhere the renaming does that.
            temporary = f"{self._root}/{_INCOMING}{uuid.uuid4().hex}"
            final = f"{self._root}/{relative_path(artifact.sha256)}"
            self._fs.makedirs(final.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(incoming), temporary)
            self._fs.mv(temporary, final)
        return artifact

    def fetch(self, artifact: Artifact, owner: str) -> Path:
        local = self._cache / relative_path(artifact.sha256)
        remote = f"{self._root}/{relative_path(artifact.sha256)}"
        what = f"the {artifact.name} of {owner}, {self.name}/{relative_path(artifact.sha256)},"
        if local.is_file() and local.stat().st_size == artifact.bytes and _sha256(local) == artifact.sha256:
            return local
        from neft.files import written_whole

        try:
            with written_whole(local) as temporary:
                self._fs.get_file(remote, str(temporary))
                check(temporary, artifact, what)
        except FileNotFoundError as error:
            raise FailedError(f"{what} is missing; {_REMEDY}") from error
        except OSError as error:
            raise FailedError(f"{what} cannot be read: {error}; {_REMEDY}") from error
        return local

    def stored(self) -> Iterator[Stored]:
        try:
            found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
        except OSError as error:
            raise FailedError(f"artifact store {self.name} cannot be listed: {error}; try again") from error
        for path, described in sorted(found.items()):
            relative = path.removeprefix(self._root).lstrip("/")
            yield Stored(relative, _named(relative), int(described["size"]), self._written_at(path))

    def _written_at(self, path: str) -> datetime:
        moment: datetime = self._fs.modified(path)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    def remove(self, stored: Stored) -> None:
        try:
            self._fs.rm_file(f"{self._root}/{stored.path}")
        except FileNotFoundError:
            return
        except OSError as error:
            raise FailedError(f"cannot remove {self.name}/{stored.path}: {error}; try again") from error


_REMEDY = "restore the file from a copy, or learn the task again"


def check(path: Path, artifact: Artifact, what: str) -> None:
    """Compare a file's size and checksum with what was recorded.

    Args:
        what: how a message begins.

    Raises:
        FailedError: the file is missing, truncated or altered.
    """
    try:
        size = path.stat().st_size
        digest = _sha256(path)
    except FileNotFoundError as error:
        raise FailedError(f"{what} is missing; {_REMEDY}") from error
    except OSError as error:
        raise FailedError(f"{what} cannot be read: {error}; {_REMEDY}") from error
    if size < artifact.bytes:
        raise FailedError(f"{what} is truncated, {size} of {artifact.bytes} bytes; {_REMEDY}")
    if digest != artifact.sha256:
        raise FailedError(f"{what} was altered: its SHA-256 is {digest[:12]}..., not as recorded; {_REMEDY}")


@contextmanager
def _reported(name: str, store: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedError(
            f"cannot write the {name} to {store}: {error}; free some space or choose a folder that can be written"
        ) from error


def _named(relative: str) -> str | None:
    """The SHA-256 that a path in a store says, if it is one of a store's own."""
    found = _NAME.fullmatch(relative)
    return found[1] if found and found[1].startswith(relative[:2]) else None


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut; `written_whole` does so for the folder of its file alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
