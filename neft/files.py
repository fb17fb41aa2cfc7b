"""Files that are written whole or not at all, and read with one clear sentence when they are broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neft.errors import FailedError, InputError, NeftError

PathLike = str | os.PathLike[str]


@contextmanager
def written_whole(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    Raises:
        FailedError: the disk is full or the folder cannot be written; nothing is left at `path`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: Exception) -> FailedError:
    return FailedError(f"cannot write {path}: {error}; free some space or choose a folder that can be written")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, on the CPU, in C order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of tensors: their names, types, shapes and bits, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _content_digest(tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> str:
    text = f"{json.dumps(description, sort_keys=True)}\0{tensors_digest(sorted(tensors.items()))}"
    return hashlib.sha256(text.encode()).hexdigest()


def save_tensors(
    path: PathLike, kind: str, tensors: Mapping[str, torch.Tensor], description: Mapping[str, Any]
) -> None:
    """Write `tensors` and a JSON `description` as one safetensors file of the given `kind`, with their digest."""
    metadata = {"format": kind, "description": description, "sha256": _content_digest(tensors, description)}
    with written_whole(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            # One key: safetensors writes several in any order, and the same content must give the same bytes.
            metadata={"neft": json.dumps(metadata, sort_keys=True)},
        )


def load_tensors(path: PathLike, kind: str, verified: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Args:
        verified: the whole file's checksum was compared already, so that the content's need not be.

    Raises:
        InputError: there is no such file, or it is of another kind.
        FailedError: the file is truncated or corrupt: a single changed bit is noticed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path} (a {kind} was expected there)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("neft", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        description = metadata.get("description", {})
    except (SafetensorError, OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise FailedError(f"{path} is corrupt ({error}); restore it from a copy or learn the task again") from error
    if metadata.get("format") != kind:
        raise InputError(f"{path} is a {metadata.get('format', 'foreign safetensors file')!r}, not a {kind!r}")
    if not verified and metadata.get("sha256") != _content_digest(tensors, description):
        raise FailedError(
            f"{path} is corrupt (its content does not have the digest that it was written with); "
            "restore it from a copy or learn the task again"
        )
    return tensors, description


@contextmanager
def understood(path: PathLike) -> Iterator[None]:
    """Around what makes something of a file's tensors and description, which anybody may have written.

    Raises:
        FailedError: they are not what a file of its kind holds.
    """
    try:
        yield
    except NeftError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FailedError(
            f"{path} is corrupt (what it holds cannot be understood: {error!r}); restore it from a copy or learn the "
            "task again"
        ) from error


@contextmanager
def written_folder(path: PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`, else removed.

    Raises:
        FailedError: the disk is full or the folder cannot be written; nothing is left at `path`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
