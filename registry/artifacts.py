"""The artifact store: safetensors files under the SHA-256 of their content, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neft.errors import FailedError


@dataclass(frozen=True)
class Artifact:
    """A stored file: what it is (`neurons`, `scores`, `overlay`), the SHA-256 of its content, and its size."""

    name: str
    sha256: str
    bytes: int


class ArtifactStore:
    """A folder of files `<sha256[:2]>/<sha256>.safetensors`. The same content is stored once."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, sha256: str) -> Path:
        """Where the file of that content is, or would be."""
        return self.root / sha256[:2] / f"{sha256}.safetensors"

    def put(self, name: str, save: Callable[[Path], None]) -> Artifact:
        """Store the file that `save` writes to the path it is given.

        A file that is already there is replaced by the same content, which mends it if it was damaged.

        Raises:
            FailedError: the disk is full or the folder cannot be written; at most an unnamed temporary file is left.
        """
        from neft.files import written_whole  # brings torch, which a look-up never needs

        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".incoming-", dir=self.root) as folder:
                incoming = Path(folder) / f"{name}.safetensors"
                save(incoming)
                artifact = Artifact(name, _sha256(incoming), incoming.stat().st_size)
                with written_whole(self.path(artifact.sha256)) as temporary:
                    incoming.replace(temporary)
            _sync_folder(self.root)
        except OSError as error:
            raise FailedError(
                f"cannot write the {name} to {self.root}: {error}; free some space or choose a folder that can be "
                "written"
            ) from error
        return artifact

    def fetch(self, artifact: Artifact, owner: str) -> Path:
        """The path of a stored file, after its size and checksum have been compared.

        Args:
            artifact: what to fetch.
            owner: the entry it belongs to, for the message.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        path = self.path(artifact.sha256)
        what = f"the {artifact.name} of {owner}, {path},"
        remedy = "restore the file from a copy, or learn the task again"
        try:
            size = path.stat().st_size
            digest = _sha256(path)
        except FileNotFoundError as error:
            raise FailedError(f"{what} is missing; {remedy}") from error
        except OSError as error:
            raise FailedError(f"{what} cannot be read: {error}; {remedy}") from error
        if size < artifact.bytes:
            raise FailedError(f"{what} is truncated, {size} of {artifact.bytes} bytes; {remedy}")
        if digest != artifact.sha256:
            raise FailedError(f"{what} was altered: its SHA-256 is {digest[:12]}..., not as recorded; {remedy}")
        return path


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
