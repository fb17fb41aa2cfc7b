"""The registry: records what each task has taught a model, and gives back any state of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from neft.errors import FailedError, InputError
from registry import integrity, undo
from registry.artifacts import Artifact, ArtifactStore, FolderStore, open_store
from registry.bitmaps import bitmap_of
from registry.database import Database, database_url
from registry.describing import Descriptions
from registry.index import Index
from registry.integrity import Removed, Report
from registry.labels import Labels
from registry.ledger import Ledger
from registry.lookups import Lookups
from registry.queries import base_model_row, entry_of_input, linked_id
from registry.recording import add_entry, columns_of, columns_of_files, recorded_base
from registry.records import BaseModel, Entry, NewEntry

if TYPE_CHECKING:
    from neft.files import PathLike
    from neft.models import Dtype
    from registry.undo import Overlaps


class Registry(Ledger, Labels, Descriptions, Lookups):
    """Entries, evaluations and runs in a database, and the files of the entries in an artifact store.

    Every method raises FailedError when the database or the store fails.
    """

    def __init__(self, database: Database, artifacts: ArtifactStore):
        super().__init__(database)
        self._artifacts, self._index = artifacts, Index()

    @property
    def artifacts(self) -> ArtifactStore:
        """Where the entries' files lie."""
        return self._artifacts

    @classmethod
    def open(
        cls, location: PathLike | None = None, *, url: str | None = None, artifacts: PathLike | None = None
    ) -> Registry:
        """Open a registry, and create it where there is none.

        Args:
            location: a folder that holds `registry.db` and `artifacts/`.
            url: another database, instead: `sqlite:///file.db` or `postgresql://user@host/name`.
            artifacts: the store of the files, for `url`: a folder, or a URL that fsspec knows, such as s3://bucket/path.

        Raises:
            InputError: neither or both of `location` and `url`, or a URL that cannot be used.
            FailedError: the database cannot be opened, is corrupt, or was written by another neft.
        """
        database, store = located(location, url, artifacts)
        return cls(Database(database), store)

    @classmethod
    def upgrade(
        cls, location: PathLike | None = None, *, url: str | None = None, artifacts: PathLike | None = None
    ) -> tuple[str | None, str | None]:
        """Bring a registry that an older neft wrote to this neft's schema: all of it, or nothing.

        Args:
            location, url, artifacts: as `open` takes them.

        Returns:
            The schema's revision before, None where there was none, and after.

        Raises:
            InputError: as `open` has it.
            FailedError: a newer neft wrote it, or a file of an entry that the upgrade reads is missing or damaged.
        """
        address, store = located(location, url, artifacts)
        database = Database(address, upgrade=store)
        database.close()
        return database.upgraded

    # What has been learnt: recording

    def add_base_model(
        self, fingerprint: str, name: str, dtype: Dtype, config: Mapping[str, Any], parameters: int
    ) -> int:
        """The id of a base model, which is recorded if it is new; what was recorded first stays.

        Args:
            fingerprint: `neft.audit.base_fingerprint` of the model.
            name: what `neft.models.load_base` loads it from.
            dtype: the dtype it is loaded in.
            config: its transformers config, as JSON.
            parameters: how many it has.
        """

        base = BaseModel(fingerprint, name, dtype, config, parameters)
        return self._database.write(lambda session: recorded_base(session, base).id)

    def record(self, new: NewEntry) -> Entry:
        """Record a learnt task as the next version of its task; once for each input digest.

        The files are written before the entry, so that an entry never lacks them; a kill in between leaves files that
        belong to nothing. Where the input digest is recorded already, that entry is returned as it is.

        Raises:
            InputError: the base model or the parent is not recorded, or the parent is of another base model.
            FailedError: the disk is full, or the store or database fails; nothing is recorded.
        """
        columns = columns_of(new)
        bitmap = bitmap_of(new.neurons)
        columns |= columns_of_files(self._stored(new))

        def work(session: Session) -> Entry:
            row = entry_of_input(session, new.input_digest)
            if row is None:
                base = base_model_row(session, new.base_model)
                if base is None:
                    raise InputError(f"base model {new.base_model[:12]} is not recorded; record it by add_base_model")
                links = {
                    f"{name}_id": linked_id(session, name, getattr(new, name), base)
                    for name in ("parent", "reused_from", "forgets")
                }
                row = add_entry(session, base, new.task, columns | links, new.neurons.space.to_dict(), bitmap)
            return Entry.from_row(row)

        return self._database.write(work)

    def forget(
        self,
        task: str | Entry,
        *,
        head: str | Entry | None = None,
        overlaps: Overlaps = "refuse",
        base: PathLike | None = None,
    ) -> Entry:
        """Take one task out of a chain: record a version of it that gives its neurons back as they were without it.

        That version is built on the end of the chain; laid on, it makes the model what it would be had the task never
        been learnt. Where no later task of the chain has changed its neurons, that is so bit for bit. Every state
        before stays where it is.

        Args:
            task: an entry, or what `get` takes.
            head: the end of the chain; by default the one entry that nothing is built on, among those that go on from
                the task.
            overlaps: what becomes of neurons that later tasks have changed too, as long as those are not forgotten:
                `refuse`; `last` leaves them as they are; `sum` makes them what they were without the task, plus what
                the later tasks changed in them.
            base: where the base model is now, as `checkout` has it.

        Returns:
            The new entry, whose `forgets` is the one taken out; the same one, if it was recorded before.

        Raises:
            InputError: no such entry, several chains to choose from, an entry that is forgotten already, or later tasks
                that own neurons of it, which are listed.
            FailedError: a file is missing or damaged, or the chain is not the state that was recorded.
        """
        return undo.forget(self, task, head=head, overlaps=overlaps, base=base)

    # What has been learnt: sharing

    def export(self, task: str | Entry, path: PathLike) -> Entry:
        """Write an entry with its whole chain to one file, for `import_` of another registry.

        The base model is named in it, not carried. Aliases stay behind; tags go along.

        Args:
            task: an entry, or what `get` takes.
            path: where to; it must not exist.

        Returns:
            The entry.

        Raises:
            InputError: something is at `path`, no such entry, or one that the rules for bundles refuse.
            FailedError: a file is missing or damaged, or `path` cannot be written; nothing is left there.
        """
        from registry.bundle import export_entry

        entry = self.get(task) if isinstance(task, str) else task
        export_entry(self._database, self._artifacts, entry, path)
        return entry

    def import_(self, path: PathLike, *, max_bytes: int | None = None) -> Entry:
        """Record the entries of a file that `export` wrote, all or none of them, under versions of this registry.

        All of the file is checked before anything is written. An entry that is recorded already stays as it is.

        Args:
            max_bytes: most bytes of all its files; 16 GiB by default.

        Returns:
            The last entry of the chain.

        Raises:
            InputError: no such file, or not what `export` writes; nothing is recorded.
            FailedError: an entry of other weights is recorded for the same inputs, or the disk, the store or the
                database fails; nothing is recorded.
        """
        from registry.bundle import MOST_BYTES, import_entries

        return import_entries(self._database, self._artifacts, path, MOST_BYTES if max_bytes is None else max_bytes)

    # What has been learnt: whether it is whole

    def verify(self, deep: bool = True) -> Report:
        """Walk the database and the store: every file and neuron set of every entry, and files that belong to none.

        Args:
            deep: read every file, and compare its checksum; else look at sizes alone.

        Raises:
            FailedError: the database or the store cannot be read at all.
        """
        return integrity.verify(self._database, self._artifacts, deep)

    def gc(self, *, older_than: timedelta = timedelta(hours=24), dry_run: bool = False) -> Removed:
        """Remove files that no entry names, and what killed writers have left; never a file that is not a registry's.

        Args:
            older_than: files that were written later stay, for their entry may be about to be recorded.
            dry_run: remove nothing, and say what would be.

        Raises:
            FailedError: the database or the store fails; run it again to remove the rest.
        """
        return integrity.gc(self._database, self._artifacts, older_than, dry_run)

    def _stored(self, new: NewEntry) -> dict[str, Artifact]:
        saves: dict[str, Callable[[Path], None]] = {"overlay": new.overlay.save}
        optional = {"scores": new.scores, "memory": new.memory, "signature": new.signature}
        saves |= {name: kept.save for name, kept in optional.items() if kept is not None}
        return {name: self._artifacts.put(name, save) for name, save in saves.items()}


def located(location: PathLike | None, url: str | None, artifacts: PathLike | None) -> tuple[URL, ArtifactStore]:
    """The database and the store that `Registry.open` is asked for; a folder is made."""
    if location is not None and url is None and artifacts is None:
        folder = Path(location)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FailedError(f"registry folder {folder} cannot be made: {error}; choose another") from error
        return URL.create("sqlite", database=str(folder / "registry.db")), FolderStore(folder / "artifacts")
    if location is None and url is not None and artifacts is not None:
        return database_url(url), open_store(artifacts)
    raise InputError("a registry is a folder, or a database `url` together with an `artifacts` store; give one")
