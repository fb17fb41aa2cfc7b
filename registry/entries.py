"""The registry: records what each task has taught a model, and gives back any state of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session

from neft.errors import FailedError, InputError
from registry.artifacts import Artifact, ArtifactStore, FolderStore, open_store
from registry.bitmaps import Numbering, bitmap_of, neurons_of, read, written
from registry.database import Database, database_url
from registry.labels import Labels
from registry.ledger import Ledger
from registry.queries import base_model_row, chain_rows, entry_of_input, linked_id, locked_task, named_entry
from registry.records import Entry, NewEntry, flat_metrics, plain
from registry.schema import BaseModelRow, EntryRow, MetricRow, NeuronSetRow, NeuronSpaceRow, TaskRow

# torch and transformers take seconds to import; only what reads tensors or loads a model imports them, when it does.
if TYPE_CHECKING:
    from pyroaring import FrozenBitMap
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neft.files import PathLike
    from neft.memory import Memory
    from neft.models import Dtype
    from neft.neurons import NeuronSet, NeuronSpace
    from neft.overlay import Overlay
    from neft.routing import Router, Signature
    from neft.scoring import Scores
    from neft.states import States

_T = TypeVar("_T")


class Registry(Ledger, Labels):
    """Entries, evaluations and runs in a database, and the files of the entries in an artifact store.

    Every method raises FailedError when the database or the store fails.
    """

    def __init__(self, database: Database, artifacts: ArtifactStore):
        super().__init__(database)
        self._artifacts = artifacts

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

        def work(session: Session) -> int:
            row = base_model_row(session, fingerprint)
            if row is None:
                row = BaseModelRow(
                    fingerprint=fingerprint,
                    name=name,
                    dtype=dtype,
                    config=plain("config", config),
                    parameters=parameters,
                )
                session.add(row)
                session.flush()
            return row.id

        return self._database.write(work)

    def record(self, new: NewEntry) -> Entry:
        """Record a learnt task as the next version of its task; once for each input digest.

        The files are written before the entry, so that an entry never lacks them; a kill in between leaves files that
        belong to nothing. Where the input digest is recorded already, that entry is returned as it is.

        Raises:
            InputError: the base model or the parent is not recorded, or the parent is of another base model.
            FailedError: the disk is full, or the store or database fails; nothing is recorded.
        """
        columns = _columns(new)
        bitmap = bitmap_of(new.neurons)
        for name, file in self._stored(new).items():
            columns |= {f"{name}_sha256": file.sha256, f"{name}_bytes": file.bytes}

        def work(session: Session) -> Entry:
            row = entry_of_input(session, new.input_digest)
            if row is None:
                base = base_model_row(session, new.base_model)
                if base is None:
                    raise InputError(f"base model {new.base_model[:12]} is not recorded; record it by add_base_model")
                task = locked_task(session, new.task, base)
                versions = select(func.max(EntryRow.version)).where(EntryRow.task_id == task.id)
                row = EntryRow(task=task, version=(session.scalar(versions) or 0) + 1, **columns)
                for name in ("parent", "reused_from", "forgets"):
                    setattr(row, f"{name}_id", linked_id(session, name, getattr(new, name), base))
                session.add(row)
                session.flush()
                _add_neurons(session, row.id, new.neurons.space, bitmap)
                session.add_all(
                    MetricRow(entry_id=row.id, name=name, value=value)
                    for name, value in flat_metrics(row.metrics).items()
                )
            return Entry.from_row(row)

        return self._database.write(work)

    def _stored(self, new: NewEntry) -> dict[str, Artifact]:
        saves: dict[str, Callable[[Path], None]] = {"overlay": new.overlay.save}
        optional = {"scores": new.scores, "memory": new.memory, "signature": new.signature}
        saves |= {name: kept.save for name, kept in optional.items() if kept is not None}
        return {name: self._artifacts.put(name, save) for name, save in saves.items()}

    # What has been learnt: look-ups

    def find(self, input_digest: str) -> Entry | None:
        """The entry that was made from these inputs, if it has been recorded."""
        with self._database.reading() as session:
            row = entry_of_input(session, input_digest)
            return Entry.from_row(row) if row else None

    def get(self, task: str, version: int | None = None, base_model: str | None = None) -> Entry:
        """A task's entry, the newest unless a version is asked for.

        Args:
            task: its name, `name@version`, or `name@alias`.
            version: the version, 1 and up.
            base_model: its name, or how its fingerprint begins; needed when the task was learnt on several.

        Raises:
            InputError: no such task, version or alias, or several base models.
        """
        with self._database.reading() as session:
            return Entry.from_row(named_entry(session, task, version, base_model))

    def list(self, stream: str | None = None, task: str | None = None) -> Sequence[Entry]:
        """All entries, in the order they were recorded, of one stream or task where one is given."""
        query = select(EntryRow).order_by(EntryRow.id)
        if stream is not None:
            query = query.where(EntryRow.stream == stream)
        if task is not None:
            query = query.join(TaskRow).where(TaskRow.name == task)
        with self._database.reading() as session:
            return [Entry.from_row(row) for row in session.scalars(query)]

    def chain(self, entry: Entry) -> Sequence[Entry]:
        """The entry and all it was built on, root first."""
        with self._database.reading() as session:
            return [Entry.from_row(row) for row in chain_rows(session, entry.id)]

    # What has been learnt: the files

    def neurons(self, entry: Entry) -> NeuronSet:
        """The entry's neuron set.

        Raises:
            FailedError: it is damaged.
        """
        from neft.neurons import NeuronSpace

        with self._database.reading() as session:
            row = session.get_one(NeuronSetRow, entry.id)
            described = session.get_one(NeuronSpaceRow, row.space_fingerprint).description
        numbering = Numbering.of(row.space_fingerprint, described)
        return neurons_of(read(row.bitmap, numbering, entry.reference), NeuronSpace.from_dict(described), numbering)

    def overlay(self, entry: Entry) -> Overlay:
        """
        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.overlay import Overlay

        return Overlay.load(self._artifacts.fetch(entry.overlay_file, entry.reference))

    def scores(self, entry: Entry) -> Scores | None:
        """The scores the set was chosen by, if they were recorded.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.scoring import Scores

        return self._loaded(entry.scores_file, entry, Scores.load)

    def memory(self, entry: Entry) -> Memory | None:
        """What the protection policy keeps of the task, if it keeps anything.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.memory import Memory

        return self._loaded(entry.memory_file, entry, Memory.load)

    def signature(self, entry: Entry) -> Signature | None:
        """What tells the task's inputs from others', if it was recorded.

        Raises:
            FailedError: the file is missing, truncated or altered.
        """
        from neft.routing import Signature

        return self._loaded(entry.signature_file, entry, Signature.load)

    def _loaded(self, file: Artifact | None, entry: Entry, load: Callable[[Path], _T]) -> _T | None:
        """What an entry's file holds, if it has one."""
        return None if file is None else load(self._artifacts.fetch(file, entry.reference))

    def checkout(
        self,
        task: str | Entry,
        version: int | None = None,
        *,
        base: PathLike | None = None,
        verify: bool = True,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model as it stood after an entry, bit for bit, and its tokenizer.

        Args:
            task: an entry, or what `get` takes.
            version: the version, for a task's name.
            base: where the base model is now, if no longer where it was loaded from.
            verify: as `lay_on` has it.

        Raises:
            InputError: no such entry, or the base model cannot be loaded or is another one.
            FailedError: a file is missing or damaged, or the model is not the one that was recorded.
        """
        from neft.models import load_base

        entry = self.get(task, version) if isinstance(task, str) else task
        name = str(base) if base is not None else entry.base_model.name
        try:
            model, tokenizer = load_base(name, entry.base_model.dtype)
        except InputError as error:
            raise InputError(
                f"the base model of {entry.reference} cannot be loaded; give the folder it is in now as `base`: {error}"
            ) from error
        self.lay_on(entry, model, verify=verify)
        return model, tokenizer

    def lay_on(self, entry: Entry, model: nn.Module, *, verify: bool = True) -> None:
        """Lay the chain of `entry` on `model`, its base model, in place; a model that is refused is left as it was.

        Args:
            entry: the state to reach.
            model: the base model, nothing laid on.
            verify: compare the base's fingerprint before, and the digest of all weights after.

        Raises:
            InputError: `model` is another base model.
            FailedError: a file is missing or damaged, or the result is not the state that was recorded.
        """
        from neft.audit import base_fingerprint, state_digest

        if verify and (found := base_fingerprint(model)) != entry.base_model.fingerprint:
            raise InputError(
                f"{entry.reference} was learnt on base model {entry.base_model.name!r} "
                f"({entry.base_model.fingerprint[:12]}), but the one given is {found[:12]}; give that base model"
            )
        states = self.states(entry, model)
        states.visit(entry.reference)
        if verify and (found := state_digest(model)) != entry.state_digest:
            states.visit(None)
            raise FailedError(
                f"{entry.reference} cannot be rebuilt: the weights' digest is {found[:12]}, recorded is "
                f"{entry.state_digest[:12]}; learn the task again"
            )

    def states(self, entry: Entry, model: nn.Module) -> States:
        """The states of an entry's chain, by reference, for `model` to step between; it stands at the base.

        Args:
            model: the base model, nothing laid on, as `neft.models.load_base` gives it.

        Raises:
            FailedError: a file is missing or damaged.
        """
        from neft.states import States

        return States(model, {link.reference: self.overlay(link) for link in self.chain(entry)})

    def router(self, task: str | Entry, version: int | None = None) -> Router:
        """Finds which entry of a chain a request belongs to, by reference.

        Args:
            task: the entry whose chain it is, or what `get` takes.
            version: the version, for a task's name.

        Raises:
            InputError: no such entry, or an entry of the chain was recorded without a signature.
            FailedError: a file is missing, truncated or altered.
        """
        from neft.routing import Router

        entry = self.get(task, version) if isinstance(task, str) else task
        signatures = {link.reference: self.signature(link) for link in self.chain(entry)}
        unsigned = [reference for reference, signature in signatures.items() if signature is None]
        if unsigned:
            raise InputError(
                f"{unsigned[0]} was recorded without a signature, so requests cannot be routed to it; learn the stream "
                "again in a new registry"
            )
        return Router({reference: signature for reference, signature in signatures.items() if signature is not None})


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


def _add_neurons(session: Session, entry_id: int, space: NeuronSpace, bitmap: FrozenBitMap) -> None:
    """Write the entry's neurons, and their space where it is new."""
    if session.get(NeuronSpaceRow, space.fingerprint) is None:
        session.add(NeuronSpaceRow(fingerprint=space.fingerprint, description=space.to_dict(), neurons=len(space)))
        session.flush()
    session.add(NeuronSetRow(entry_id=entry_id, space_fingerprint=space.fingerprint, bitmap=written(bitmap)))


def _columns(new: NewEntry) -> dict[str, Any]:
    """The columns of a new entry that need neither its files nor the database."""
    mappings = {
        name: plain(name, getattr(new, name)) for name in ("method", "training", "metrics", "audit", "versions")
    }
    return mappings | {
        "stream": new.stream,
        "input_digest": new.input_digest,
        "seed": new.seed,
        "data_fingerprint": new.data_fingerprint,
        "neuron_count": len(new.neurons),
        "parameter_count": new.overlay.parameters,
        "space_fingerprint": new.neurons.space.fingerprint,
        "state_digest": new.state_digest,
        "mlflow_run_id": new.mlflow_run_id,
        "prefect_flow_run_id": new.prefect_flow_run_id,
    }
