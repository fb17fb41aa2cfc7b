"""The commands of `neft registry` that write what was learnt elsewhere, take it back, and keep the registry whole."""

from __future__ import annotations

from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from flows.registries import Where
from flows.registry_options import (
    OUT,
    BaseModel,
    Debug,
    EntryName,
    Json,
    Location,
    cells,
    open_registry,
    print_json,
    registry_app,
)
from neft.errors import FailedError

if TYPE_CHECKING:
    from registry.integrity import Orphan
    from registry.undo import Overlaps

Base = Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")]


@registry_app.command()
def checkout(
    task: EntryName,
    to: Annotated[Path, typer.Option(help="Folder to write to; must not exist.", show_default=False)],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write a PEFT adapter of all that was learnt, without the base model.")
    ] = False,
    base: Base = None,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Write the model as it stood after a task to a folder that transformers loads, or as an adapter that PEFT loads.

    What was written is loaded again and compared bit for bit.

    Example: neft registry checkout bbc-topic --to models/after-bbc
    """
    with open_registry(location) as registry:
        entry = registry.get(task, base_model=base_model)
        write = registry.write_adapter if adapter else registry.write_model
        write(entry, to, base=base)
    described = {"entry": entry.reference, "folder": str(to), "state_digest": entry.state_digest, "adapter": adapter}
    what = "the adapter that gives the model after it" if adapter else "the model after it"
    _tell(f"{entry.reference}: {what} is in {to}, bit for bit (state {entry.state_digest[:12]})", json_, described)


@registry_app.command()
def export(
    task: EntryName,
    to: Annotated[Path, typer.Option(help="File to write to; must not exist.", show_default=False)],
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Write an entry with its whole chain to one file, for another registry; the base model is named, not carried.

    Example: neft registry export bbc-topic@champion --to bbc-topic.zip
    """
    with open_registry(location) as registry:
        entry = registry.export(registry.get(task, base_model=base_model), to)
        chain = [link.reference for link in registry.chain(entry)]
    size = to.stat().st_size
    described = {"entry": entry.reference, "file": str(to), "entries": chain, "bytes": size}
    _tell(f"{entry.reference}: {_counted(len(chain), 'entry', 'entries')}, {_size(size)}, in {to}", json_, described)


@registry_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `neft registry export` wrote.", show_default=False)],
    max_bytes: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="Most bytes of its files; default: 16 GiB.")
    ] = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Record the entries of an exported file, all or none, after everything in it has been checked.

    Example: neft registry import bbc-topic.zip
    """
    with closing(Where.found(location).open()) as registry:
        entry = registry.import_(file, max_bytes=max_bytes)
        chain = [link.reference for link in registry.chain(entry)]
    told = f"{_counted(len(chain), 'entry is', 'entries are')} recorded, the last of them as {entry.reference}"
    _tell(f"{file}: {told}", json_, {"entry": entry.reference, "entries": chain})


@registry_app.command()
def forget(
    task: EntryName,
    head: Annotated[
        str | None, typer.Option(metavar="ENTRY", help="End of the chain; needed when several go on from the task.")
    ] = None,
    overlaps: Annotated[
        str,
        typer.Option(
            metavar="refuse|last|sum",
            help="What becomes of neurons that later tasks changed too: last leaves them, sum keeps their changes.",
        ),
    ] = "refuse",
    base: Base = None,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Take one task out of its chain: record a version of it that gives its neurons back as they were without it.

    Nothing is lost: every state before can be checked out as ever.

    Example: neft registry forget film-sentiment --head bbc-topic
    """
    with open_registry(location) as registry:
        end = None if head is None else registry.get(head, base_model=base_model)
        named = task if end is not None else registry.get(task, base_model=base_model)
        entry = registry.forget(named, head=end, overlaps=cast("Overlaps", overlaps), base=base)
    told = f"{entry.reference}: {entry.forgets} is taken out of the chain of {entry.parent}"
    _tell(f"{told}, {entry.neuron_count:,} neurons given back", json_, entry.to_dict())


@registry_app.command()
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Look at the files' sizes alone, not into them.")] = False,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Check every file and neuron set of every entry; exit code 1 when one is missing or damaged.

    Example: neft registry verify
    """
    with open_registry(location) as registry:
        report = registry.verify(deep=not quick)
    if json_:
        print_json(report.to_dict())
    else:
        if report.problems:
            table = Table("what is damaged", "how", "entries that need it")
            for problem in report.problems:
                table.add_row(*cells(problem.name, problem.fault, ", ".join(problem.entries)))
            OUT.print(table)
        if report.orphans:
            OUT.print(_orphans_table(report.orphans))
    held = f"{_counted(report.entries, 'entry', 'entries')} with {_counted(report.files, 'file', 'files')}"
    held = f"{held}, {_size(report.bytes)}"
    if not report.whole:
        raise FailedError(
            f"{_counted(len(report.problems), 'thing is', 'things are')} missing or damaged in the registry of {held}; "
            "restore them from a copy, or import an export of those entries again"
        )
    if not json_:
        orphans = f"; {_counted(len(report.orphans), 'file belongs', 'files belong')} to no entry"
        _tell(f"the registry is whole: {held}{orphans if report.orphans else ''}", False, None)


@registry_app.command()
def gc(
    older_than: Annotated[
        int, typer.Option(metavar="HOURS", min=0, max=10**6, help="Leave what was written later.")
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, and list what would be.")] = False,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Remove files that no entry names: of entries that were never recorded, and of writers that were killed.

    Example: neft registry gc --dry-run
    """
    with open_registry(location) as registry:
        removed = registry.gc(older_than=timedelta(hours=older_than), dry_run=dry_run)
    if removed.orphans and not json_:
        OUT.print(_orphans_table(removed.orphans))
    told = f"{_counted(len(removed.orphans), 'file', 'files')}, {_size(removed.bytes)},"
    _tell(f"{told} {'would be removed' if dry_run else 'removed'}", json_, removed.to_dict())


@registry_app.command()
def upgrade(json_: Json = False, location: Location = None, debug: Debug = False) -> None:
    """Bring a registry that an older neft wrote to this neft's schema: all of it, or nothing.

    Example: neft registry upgrade
    """
    from registry import Registry

    where = Where.found(location)
    where.check_there()
    before, after = Registry.upgrade(**where.arguments)
    told = f"from schema {before} to {after}" if before != after else f"at schema {after} already"
    _tell(f"the registry is {'upgraded ' if before != after else ''}{told}", json_, {"before": before, "after": after})


def _tell(sentence: str, as_json: bool, described: Any) -> None:
    """Print a command's result."""
    if as_json:
        print_json(described)
    else:
        OUT.print(*cells(sentence), highlight=False, soft_wrap=True)


def _orphans_table(orphans: tuple[Orphan, ...]) -> Table:
    table = Table("file of no entry", "kind", "bytes")
    for orphan in orphans:
        table.add_row(*cells(orphan.path, orphan.kind, f"{orphan.bytes:,}"))
    return table


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _size(count: int) -> str:
    """Bytes, in the unit that shows them best."""
    units = ("bytes", "kB", "MB", "GB")
    size, place = float(count), 0
    while size >= 1000 and place < len(units) - 1:
        size, place = size / 1000, place + 1
    return f"{size:.1f} {units[place]}" if place else f"{count} bytes"
