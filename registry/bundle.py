"""Bundles: one file that carries an entry with its whole chain to another registry.

A bundle is a zip archive whose members are stored as they are: `manifest.json`, and `files/<sha256>.safetensors` for
each file that the entries name. Nothing of a bundle is believed: what it says is checked against what it holds, and all
of it before anything is written.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pyroaring import FrozenBitMap
from sqlalchemy import select
from sqlalchemy.orm import Session

from neft.errors import FailedError, InputError, NeftError
from neft.files import PathLike, written_whole
from neft.neurons import NeuronSpace
from registry.artifacts import Artifact, ArtifactStore
from registry.bitmaps import Numbering, bitmap_of, read, written
from registry.checkout import refuse_existing
from registry.database import Database
from registry.manifest import BaseModelRecord, EntryRecord, FilesRecord, Manifest, check_widths
from registry.queries import base_model_row, chain_rows, entry_of_input
from registry.recording import add_entry, columns_of_files, recorded_base
from registry.records import BaseModel, Entry
from registry.schema import BaseModelRow, EntryRow, NeuronSetRow, NeuronSpaceRow, TagRow, TaskRow
from registry.text import shortened
from registry.vetting import vet, vetted_overlay

#: Most bytes of the files of a bundle, of its manifest, and of what is read at once.
MOST_BYTES, MOST_MANIFEST, MOST_AT_ONCE = 16 * 2**30, 64 * 2**20, 8 * 2**20

_MANIFEST = "manifest.json"
_CHUNK = 2**20
#: What the zip module raises for a file that is no archive, or a damaged or a made-up one.
_BROKEN = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, ValueError),
    *(zlib.error, struct.error, OverflowError),
)
#: The same moment for every member, so that the same entries give the same bytes.
_MOMENT = (1980, 1, 1, 0, 0, 0)
#: Columns of an entry that a bundle carries as they are.
_KEPT = (
    *("stream", "input_digest", "seed", "data_fingerprint", "method", "training", "state_digest"),
    *("metrics", "audit", "mlflow_run_id", "prefect_flow_run_id", "versions"),
)


# Export


def export_entry(database: Database, artifacts: ArtifactStore, entry: Entry, path: PathLike) -> None:
    """`Registry.export`."""
    refuse_existing(path)
    with database.reading() as session:
        rows = chain_rows(session, entry.id)
        described = _described(session, rows)
        files = {file.sha256: (file, link.reference) for link in map(Entry.from_row, rows) for file in link.files}
    try:
        manifest = Manifest.model_validate_json(json.dumps(described))
    except ValidationError as error:
        raise InputError(f"{entry.reference} cannot be exported: {_first(error)}") from error
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(_MANIFEST, _MOMENT), manifest.model_dump_json())
        for sha256, (file, owner) in sorted(files.items()):
            with (
                artifacts.fetch(file, owner).open("rb") as source,
                archive.open(zipfile.ZipInfo(_member(sha256), _MOMENT), "w", force_zip64=True) as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK)


def _described(session: Session, rows: Sequence[EntryRow]) -> dict[str, Any]:
    """The manifest of a chain, root first."""
    spaces = {row.space_fingerprint: session.get_one(NeuronSpaceRow, row.space_fingerprint) for row in rows}
    base = rows[0].task.base_model
    return {
        "format": "neft-bundle",
        "version": 1,
        "base_model": {name: getattr(base, name) for name in BaseModelRecord.model_fields},
        "spaces": {name: row.description for name, row in spaces.items()},
        "entries": [_entry(session, row, spaces[row.space_fingerprint]) for row in rows],
    }


def _entry(session: Session, row: EntryRow, space: NeuronSpaceRow) -> dict[str, Any]:
    entry = Entry.from_row(row)
    numbering = Numbering.of(space.fingerprint, space.description)
    bitmap = read(session.get_one(NeuronSetRow, row.id).bitmap, numbering, entry.reference)
    tags = session.execute(select(TagRow.key, TagRow.value).where(TagRow.entry_id == row.id).order_by(TagRow.key))
    files = {file.name: {"sha256": file.sha256, "bytes": file.bytes} for file in entry.files}
    return {name: getattr(row, name) for name in _KEPT} | {
        "task": entry.task,
        "parent": _input_digest(session, row.parent_id),
        "reused_from": _input_digest(session, row.reused_from_id),
        "forgets": _input_digest(session, row.forgets_id),
        "space": row.space_fingerprint,
        "neurons": base64.b64encode(written(bitmap)).decode(),
        "files": {name: files.get(name) for name in FilesRecord.model_fields},
        "created_at": row.created_at.isoformat(),
        "tags": dict(tags.tuples().all()),
    }


def _input_digest(session: Session, entry_id: int | None) -> str | None:
    """By what another registry knows an entry."""
    return None if entry_id is None else session.get_one(EntryRow, entry_id).input_digest


# Import


def import_entries(database: Database, artifacts: ArtifactStore, path: PathLike, max_bytes: int = MOST_BYTES) -> Entry:
    """`Registry.import_`."""
    with _opened(Path(path), max_bytes) as bundle:
        parameters = _vetted(bundle)
        with database.reading() as session:
            _check_against(session, bundle)
        for file in bundle.manifest.files.values():
            artifacts.put(file.name, partial(bundle.copy, file.sha256))
        return database.write(lambda session: _record(session, bundle, parameters))


@dataclass(frozen=True)
class _Bundle:
    """An archive whose members are the ones that its manifest names."""

    path: Path
    archive: zipfile.ZipFile
    manifest: Manifest

    def refused(self, reason: object) -> InputError:
        return _refused(self.path, reason)

    def copy(self, sha256: str, target: Path) -> None:
        """Copy a file out of the archive.

        Raises:
            InputError: it is not what the manifest says.
        """
        size, digest = self.manifest.files[sha256].bytes, hashlib.sha256()
        left = size
        with _reading(self.path), self.archive.open(_member(sha256)) as source, target.open("wb") as copy:
            while chunk := source.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                copy.write(chunk)
        if left != 0:
            raise self.refused(f"{_member(sha256)} does not have the {size} bytes that the manifest says")
        if digest.hexdigest() != sha256:
            raise self.refused(f"{_member(sha256)} was altered: its SHA-256 is {digest.hexdigest()[:12]}...")


class _Sparing(io.BufferedReader):
    """A file that is never read much at once: a directory of an archive that claims to be huge is refused."""

    def read(self, size: int | None = -1, /) -> bytes:
        # To the end, or so many bytes: one more than the most, and it is too much.
        content = super().read(MOST_AT_ONCE + 1 if size is None or size < 0 else min(size, MOST_AT_ONCE + 1))
        if len(content) > MOST_AT_ONCE:
            raise zipfile.BadZipFile(f"its directory has more than {MOST_AT_ONCE} bytes")
        return content


@contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[_Bundle]:
    """
    Raises:
        InputError: no such file, or no bundle.
        FailedError: it cannot be read, or the disk is full.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path} (a bundle that `neft registry export` wrote was expected there)")
    with ExitStack() as stack:
        with _reading(path):
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_Sparing(io.FileIO(path)))))
            manifest = _manifest(path, archive)
            _check_members(path, archive, manifest, max_bytes)
        yield _Bundle(path, archive, manifest)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the zip module and the disk complain of into one sentence."""
    try:
        yield
    except NeftError:
        raise
    except OSError as error:
        raise FailedError(f"{path} cannot be read or unpacked: {error}; free some space and try again") from error
    except _BROKEN as error:
        raise _refused(path, str(error) or type(error).__name__) from error


def _manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    members = {member.filename: member for member in archive.infolist()}
    if _MANIFEST not in members:
        raise _refused(path, f"it has no {_MANIFEST}, so it is not a bundle")
    _check_plain(path, members[_MANIFEST])
    if members[_MANIFEST].file_size > MOST_MANIFEST:
        raise _refused(path, f"its {_MANIFEST} has more than {MOST_MANIFEST} bytes")
    content = bytearray()
    with archive.open(_MANIFEST) as file:
        while len(content) <= MOST_MANIFEST and (chunk := file.read(_CHUNK)):
            content += chunk
    try:
        return Manifest.model_validate_json(bytes(content))
    except ValidationError as error:
        raise _refused(path, f"its {_MANIFEST}: {_first(error)}") from error


def _check_plain(path: Path, member: zipfile.ZipInfo) -> None:
    """
    Raises:
        InputError: the member is compressed, encrypted or no file.
    """
    mode = member.external_attr >> 16
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise _refused(path, f"{_shown(member)} is compressed, and a bundle's members are not")
    if member.flag_bits & 0x41 or (mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode)) or member.is_dir():
        raise _refused(path, f"{_shown(member)} is encrypted, or no file")


def _check_members(path: Path, archive: zipfile.ZipFile, manifest: Manifest, max_bytes: int) -> None:
    """
    Raises:
        InputError: the members are not those of the manifest, each once, or too large.
    """
    sizes = {_member(sha256): file.bytes for sha256, file in manifest.files.items()}
    seen = set()
    for member in archive.infolist():
        _check_plain(path, member)
        name = member.orig_filename
        if name in seen or name not in {_MANIFEST, *sizes}:
            raise _refused(
                path, f"{_shown(member)} is there twice" if name in seen else f"{_shown(member)} is no part of it"
            )
        seen.add(name)
        if member.file_size != sizes.get(name, member.file_size):
            raise _refused(path, f"{_shown(member)} does not have the {sizes[name]} bytes that the manifest says")
    if missing := sorted(sizes.keys() - seen):
        raise _refused(path, f"{missing[0]} is missing")
    if sum(sizes.values()) > max_bytes:
        raise InputError(
            f"{path} cannot be imported: its files have {sum(sizes.values()):,} bytes, more than the {max_bytes:,} "
            "that are allowed; allow more if you trust it"
        )
    if sum(sizes.values()) > path.stat().st_size:
        raise _refused(path, "its members lie over one another")


def _vetted(bundle: _Bundle) -> Mapping[str, int]:
    """Input digest -> parameters of the overlay, of every entry; each file has been loaded, one at a time.

    Raises:
        InputError: a file is not what it should be, or not of the neurons that its entry has.
    """
    found = {}
    with _reading(bundle.path), tempfile.TemporaryDirectory(prefix="neft-") as folder:
        path = Path(folder) / "file.safetensors"
        for entry in bundle.manifest.entries:
            space = bundle.manifest.spaces[entry.space].space
            for kind, file in entry.files.present().items():
                bundle.copy(file.sha256, path)
                try:
                    if kind == "overlay":
                        found[entry.input_digest] = _parameters(path, space, entry)
                    else:
                        vet(kind, path, space)
                except InputError as error:
                    raise bundle.refused(f"{_member(file.sha256)} {error}") from error
    return found


def _parameters(path: Path, space: NeuronSpace, entry: EntryRecord) -> int:
    overlay = vetted_overlay(path, space)
    # Compared as bytes: a bitmap that somebody has made up is never taken apart.
    if written(bitmap_of(overlay.neurons)) != entry.neurons:
        raise InputError(f"has other neurons than its entry of task {entry.task!r}")
    return overlay.parameters


def _check_against(session: Session, bundle: _Bundle) -> None:
    """Compare the bundle with what is recorded already.

    Raises:
        InputError: its base model or its neurons are others than those that are recorded under the same fingerprint.
        FailedError: it has another result for inputs that are recorded.
    """
    manifest = bundle.manifest
    base = base_model_row(session, manifest.base_model.fingerprint)
    if base is not None:
        if (base.dtype, base.parameters) != (manifest.base_model.dtype, manifest.base_model.parameters):
            raise bundle.refused(f"its base model {base.fingerprint[:12]} is recorded otherwise here")
        here = select(NeuronSpaceRow).where(
            NeuronSpaceRow.fingerprint.in_(
                select(EntryRow.space_fingerprint).join(TaskRow).where(TaskRow.base_model_id == base.id)
            )
        )
        try:
            check_widths([*(row.description for row in session.scalars(here)), *manifest.descriptions.values()])
        except ValueError as error:
            raise bundle.refused(f"{error}, here and in it") from error
    for entry in manifest.entries:
        row = entry_of_input(session, entry.input_digest)
        if row is not None:
            _check_same(bundle, entry, row)


def _check_same(bundle: _Bundle, entry: EntryRecord, row: EntryRow) -> None:
    same_base = row.task.base_model.fingerprint == bundle.manifest.base_model.fingerprint
    if row.state_digest != entry.state_digest or not same_base:
        raise FailedError(
            f"{bundle.path} cannot be imported: {row.task.name}@{row.version} was learnt here from the same inputs as "
            f"its entry of task {entry.task!r}, to another state ({row.state_digest[:12]}, not "
            f"{entry.state_digest[:12]}); import it into another registry"
        )


def _record(session: Session, bundle: _Bundle, parameters: Mapping[str, int]) -> Entry:
    """Write every entry that is not recorded yet; the head, as it is recorded."""
    manifest = bundle.manifest
    _check_against(session, bundle)
    base = recorded_base(session, BaseModel(**manifest.base_model.model_dump()))
    rows: dict[str, EntryRow] = {}
    for entry in manifest.entries:
        row = entry_of_input(session, entry.input_digest)
        if row is None:
            columns = {name: getattr(entry, name) for name in (*_KEPT, "created_at")}
            columns |= _links(session, entry, rows, base)
            columns |= columns_of_files(
                {name: Artifact(name, file.sha256, file.bytes) for name, file in entry.files.present().items()}
            )
            space = manifest.descriptions[entry.space]
            bitmap = FrozenBitMap.deserialize(entry.neurons)
            columns |= {"neuron_count": len(bitmap), "parameter_count": parameters[entry.input_digest]}
            row = add_entry(session, base, entry.task, columns | {"space_fingerprint": entry.space}, space, bitmap)
            session.add_all(TagRow(entry_id=row.id, key=key, value=value) for key, value in entry.tags.items())
        rows[entry.input_digest] = row
    session.flush()
    return Entry.from_row(rows[manifest.entries[-1].input_digest])


def _links(
    session: Session, entry: EntryRecord, rows: Mapping[str, EntryRow], base: BaseModelRow
) -> dict[str, int | None]:
    """The ids of the entries that an entry names; what it was reused from need not be recorded here."""
    found: dict[str, int | None] = {
        f"{name}_id": None if digest is None else rows[digest].id
        for name, digest in (("parent", entry.parent), ("forgets", entry.forgets))
    }
    source = None if entry.reused_from is None else entry_of_input(session, entry.reused_from)
    known = source is not None and source.task.base_model_id == base.id
    return found | {"reused_from_id": source.id if source is not None and known else None}


def _member(sha256: str) -> str:
    return f"files/{sha256}.safetensors"


def _shown(member: zipfile.ZipInfo) -> str:
    return f"member {shortened(member.orig_filename)}"


def _refused(path: Path, reason: object) -> InputError:
    return InputError(f"{path} cannot be imported: {reason}; export it again")


def _first(error: ValidationError) -> str:
    """The first of a manifest's problems."""
    problem = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part)[:20] for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else problem["msg"]
