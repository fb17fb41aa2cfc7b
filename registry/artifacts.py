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
from typing import Any, Literal, Protocol

from neft.errors import FailedError, InputError
from registry.text import shortened

#: What may be wrong with a file.
Fault = Literal["missing", "truncated", "altered", "unreadable"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
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

    def fault(self, artifact: Artifact, deep: bool) -> Fault | None:
        """What is wrong with a file as it lies in the store now, if anything; nothing is kept of it.

        Args:
            deep: read all of it, and compare its checksum, not its size alone.
        """
        ...

    def remove(self, stored: Stored) -> bool:
        """Remove a file, unless it is gone or has been written again since it was listed; whether it was removed.

        Raises:
            FailedError: the store cannot be written.
        """
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
    """Where in a store the file of that content lies.

    Raises:
        InputError: it is no SHA-256, and might lead out of the store.
    """
    if not _SHA256.fullmatch(sha256):
        raise InputError(f"{shortened(sha256)} names no file of an artifact store: give 64 digits, 0-9 and a-f")
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
        for path in sorted(self._files()):
            try:
                status = path.lstat()
            except FileNotFoundError:  # another process has put it in its place meanwhile
                continue
            relative = path.relative_to(self.root).as_posix()
            yield Stored(relative, _named(relative), status.st_size, _moment(status.st_mtime))

    def _files(self) -> Iterator[Path]:
        """Everything but folders. A folder may go while it is read, and one that cannot be read is an error."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise FailedError(f"artifact store {self.name} cannot be listed: {error}; try again") from error

        for folder, _, names in os.walk(self.root, onerror=refuse):
            yield from (Path(folder, name) for name in names)

    def fault(self, artifact: Artifact, deep: bool) -> Fault | None:
        path = self.path(artifact.sha256)
        try:
            size = path.stat().st_size
            digest = _sha256(path) if deep and size == artifact.bytes else artifact.sha256
        except FileNotFoundError:
            return "missing"
        except OSError:
            return "unreadable"
        return _compared(artifact, size, digest)

    def remove(self, stored: Stored) -> bool:
        path = self.root / stored.path
        if ".." in path.relative_to(self.root).parts:
            raise InputError(f"{shortened(stored.path)} lies outside of artifact store {self.name}")
        try:
            if _moment(path.lstat().st_mtime) != stored.written_at:
                return False
            path.unlink()
            if path.parent.name.startswith(_INCOMING):
                shutil.rmtree(path.parent, ignore_errors=True)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise FailedError(f"cannot remove {path}: {error}; mend its permissions and try again") from error
        return True


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

        with written_whole(local) as temporary:
            try:
                self._fs.get_file(remote, str(temporary))
            except FileNotFoundError as error:
                raise FailedError(f"{what} is missing; {_REMEDY}") from error
            except OSError as error:
                raise FailedError(f"{what} cannot be fetched to {local}: {error}; {_REMEDY}") from error
            check(temporary, artifact, what)
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

    def fault(self, artifact: Artifact, deep: bool) -> Fault | None:
        remote = f"{self._root}/{relative_path(artifact.sha256)}"
        digest = artifact.sha256
        try:
            size = int(self._fs.size(remote))
            if deep and size == artifact.bytes:
                with self._fs.open(remote, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "missing"
        except OSError:
            return "unreadable"
        return _compared(artifact, size, digest)

    def remove(self, stored: Stored) -> bool:
        path = f"{self._root}/{stored.path}"
        try:
            if self._written_at(path) != stored.written_at:
                return False
            self._fs.rm_file(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise FailedError(f"cannot remove {self.name}/{stored.path}: {error}; try again") from error
        return True


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


def _compared(artifact: Artifact, size: int, sha256: str) -> Fault | None:
    """What is wrong with a file of that size and content."""
    if size < artifact.bytes:
        return "truncated"
    return None if (size, sha256) == (artifact.bytes, artifact.sha256) else "altered"


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
