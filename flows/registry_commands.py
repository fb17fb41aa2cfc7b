"""The commands of `neft registry` that look things up, and those that set aliases and tags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from rich.tree import Tree

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
from neft.errors import InputError

if TYPE_CHECKING:
    from registry import Entry, Lineage, Registry

First = Annotated[str, typer.Argument(metavar="A", help="An entry: TASK, TASK@2, TASK@ALIAS.", show_default=False)]
Second = Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)]
HowMany = Annotated[int, typer.Option("-k", min=1, help="How many at most.")]


# Entries


@registry_app.command("list")
def list_entries(
    stream: Annotated[str | None, typer.Option(help="Only entries of this stream.")] = None,
    task: Annotated[str | None, typer.Option(help="Only versions of this task.")] = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """List the entries, newest last.

    Example: neft registry list --stream demo
    """
    with open_registry(location) as registry:
        entries = registry.list(stream, task)
    if json_:
        print_json([entry.to_dict() for entry in entries])
        return
    OUT.print(_entries_table(entries))


@registry_app.command()
def search(
    filter_: Annotated[
        str, typer.Argument(metavar="FILTER", help="Which entries; '' for all.", show_default=False)
    ] = "",
    order_by: Annotated[
        list[str] | None, typer.Option(metavar="KEY [DESC]", help="Order; may be given several times.")
    ] = None,
    most: Annotated[int, typer.Option("--max", min=1, help="Entries at most.")] = 100,
    page: Annotated[str | None, typer.Option(metavar="TOKEN", help="The page after one that had more.")] = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Find entries by what is recorded of them, newest first.

    FILTER compares task, version, stream, base_model, alias, parent, reused_from, forgets, neurons, parameters, seed,
    created, mlflow_run_id, prefect_flow_run_id, input_digest, data_fingerprint, tags.KEY and metrics.NAME by =, !=, <,
    <=, >, >=, LIKE, ILIKE, IN, NOT IN, IS NULL and IS NOT NULL, joined by AND, OR, NOT and brackets.

    Example: neft registry search "task = 'bbc-topic' AND metrics.accuracy >= 0.8" --order-by "metrics.accuracy DESC"
    """
    with open_registry(location) as registry:
        found = registry.search(filter_, order_by=order_by or (), max_results=most, page_token=page)
    if json_:
        print_json(found.to_dict())
        return
    OUT.print(_entries_table(found.entries))
    if found.next_token is not None:
        OUT.print(f"there are more: --page {found.next_token}", highlight=False, markup=False)


def _entries_table(entries: Sequence[Entry]) -> Table:
    table = Table("entry", "stream", "built on", "neurons", "parameters", "score", "learnt at")
    for entry in entries:
        score = entry.metrics.get("scores", {}).get(entry.task)
        table.add_row(
            *cells(
                entry.reference,
                entry.stream,
                entry.parent or "the base model",
                f"{entry.neuron_count:,}",
                f"{entry.parameter_count:,}",
                "-" if score is None else f"{score:.3f}",
                f"{entry.created_at:%Y-%m-%d %H:%M}",
            )
        )
    return table


@registry_app.command()
def show(
    task: EntryName,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Show one entry: its neurons, what it was learnt from and how, its metrics, aliases and tags.

    Example: neft registry show bbc-topic
    """
    with open_registry(location) as registry:
        described = dict(registry.describe(task, base_model))
    if json_:
        print_json(described)
        return
    sites = described.pop("sites")
    # The ledger stands beside the sites.
    capacity = described["metrics"].get("capacity", {})
    described["metrics"] = {name: value for name, value in described["metrics"].items() if name != "capacity"}
    table = Table("field", "value", title=cells(described["reference"])[0])
    for name, value in described.items():
        table.add_row(*cells(name, value if isinstance(value, str) else json.dumps(value, indent=1)))
    table.add_row("sites", _sites_table(sites, capacity))
    OUT.print(table)


def _sites_table(sites: Mapping[str, int], capacity: Mapping[str, Sequence[int]]) -> Table:
    """Each site's neurons in an entry's set, and how many were free there before and after it was learnt."""
    table = Table("site", "neurons", "free before", "free after")
    for name in capacity or sites:
        table.add_row(name, f"{sites.get(name, 0):,}", *(f"{count:,}" for count in capacity.get(name, ())))
    return table


@registry_app.command()
def tasks(json_: Json = False, location: Location = None, debug: Debug = False) -> None:
    """List the tasks, with how many versions each has, its streams and its aliases.

    Example: neft registry tasks
    """
    with open_registry(location) as registry:
        found = registry.tasks()
    if json_:
        print_json([each.to_dict() for each in found])
        return
    table = Table("task", "base model", "versions", "newest", "streams", "aliases")
    for each in found:
        aliases = ", ".join(f"{alias}: {version}" for alias, version in each.aliases.items())
        base = f"{each.base_model_name} ({each.base_model[:12]})"
        table.add_row(*cells(each.name, base, each.versions, each.newest, ", ".join(each.streams), aliases))
    OUT.print(table)


@registry_app.command()
def lineage(
    entry: EntryName,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Show the tree that an entry stands in: what it was built on, and all that was built on that.

    Example: neft registry lineage bbc-topic
    """
    with open_registry(location) as registry:
        asked = registry.get(entry, base_model=base_model)
        found = registry.lineage(asked)
    if json_:
        print_json(found.to_dict())
        return
    OUT.print(_tree(found, asked.reference))


def _tree(found: Lineage, asked: str) -> Tree:
    """The tree, with the entry that was asked for in bold."""

    def label(each: Lineage) -> Any:
        [text] = cells(each.entry if each.link in (None, "parent") else f"{each.entry} ({_LINKS[str(each.link)]})")
        if each.entry == asked:
            text.stylize("bold")
        return text

    tree = Tree(label(found))
    left = [(found, tree)]
    while left:
        each, branch = left.pop()
        left += [(child, branch.add(label(child))) for child in each.children]
    return tree


#: Link -> what is said of the entry that stands under another one by it.
_LINKS = {"reused from": "reused from the one above", "forgets": "forgets the one above"}


# Neurons


@registry_app.command()
def owners(
    site: Annotated[str, typer.Argument(metavar="SITE", help="A site: model.layers.3.ffn.", show_default=False)],
    neuron: Annotated[
        int | None, typer.Argument(metavar="[NEURON]", help="A neuron of it, from 0.", show_default=False)
    ] = None,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Say which entries own a neuron, or any neuron of a site, and how many.

    Example: neft registry owners model.layers.3.ffn 17
    """
    with open_registry(location) as registry:
        found = registry.owners(site, neuron, base_model=base_model)
    if json_:
        print_json([each.to_dict() for each in found])
        return
    table = Table("entry", "neurons")
    for each in found:
        table.add_row(*cells(each.entry, f"{each.neurons:,}"))
    OUT.print(table)


@registry_app.command()
def overlap(
    first: First,
    second: Second,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Say how many neurons two entries share, and where.

    Example: neft registry overlap bbc-topic film-sentiment
    """
    with open_registry(location) as registry:
        found = registry.overlap(*_both(registry, first, second, base_model))
    if json_:
        print_json(found.to_dict())
        return
    table = Table("neurons", "how many")
    table.add_row(*cells("shared", f"{found.shared:,}"))
    table.add_row(*cells(f"only {found.first}", f"{found.only_first:,}"))
    table.add_row(*cells(f"only {found.second}", f"{found.only_second:,}"))
    table.add_row(*cells("intersection over union", f"{found.iou:.3f}"))
    for site, count in found.sites.items():
        table.add_row(*cells(f"shared in {site}", f"{count:,}"))
    OUT.print(table)


@registry_app.command()
def overlaps(
    stream: Annotated[str, typer.Argument(help="A stream, by name.", show_default=False)],
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Show what a stream's tasks share, each with each: intersection over union of their newest versions.

    Example: neft registry overlaps demo
    """
    with open_registry(location) as registry:
        found = registry.overlaps(stream)
    if json_:
        print_json(found.to_dict())
        return
    table = Table("", *map(Column, cells(*found.entries)), "neurons")
    for name, row, size in zip(found.entries, found.iou, found.sizes, strict=True):
        table.add_row(*cells(name, *(f"{value:.3f}" for value in row), f"{size:,}"))
    OUT.print(table)


class Likeness(Enum):
    """What two entries are alike in."""

    neurons = "neurons"
    scores = "scores"


@registry_app.command()
def nearest(
    to: Annotated[
        str,
        typer.Argument(
            metavar="ENTRY",
            help="An entry, or a file that NeuronSet.save wrote, or Scores.save with --by scores.",
            show_default=False,
        ),
    ],
    k: HowMany = 10,
    by: Annotated[Likeness, typer.Option(help="What is compared.")] = Likeness.neurons,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """List the entries whose neurons are most like an entry's, by intersection over union; or whose scores are.

    Example: neft registry nearest bbc-topic -k 5
    """
    with open_registry(location) as registry:
        if not Path(to).is_file():
            found = registry.nearest(registry.get(to, base_model=base_model), k, by=by.value)
        elif by is Likeness.scores:
            from neft.scoring import Scores

            found = registry.nearest(Scores.load(to), k)
        else:
            from neft.neurons import NeuronSet

            found = registry.nearest(NeuronSet.load(to), k)
    if json_:
        print_json([each.to_dict() for each in found])
        return
    table = Table("entry", "correlation of scores" if by is Likeness.scores else "intersection over union")
    for each in found:
        table.add_row(*cells(each.entry, f"{each.value:.3f}"))
    OUT.print(table)


@registry_app.command()
def diff(
    first: First,
    second: Second,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Show what the second entry has otherwise than the first: neurons, and how it was learnt.

    Example: neft registry diff bbc-topic@1 bbc-topic@2
    """
    with open_registry(location) as registry:
        found = registry.diff(*_both(registry, first, second, base_model))
    if json_:
        print_json(found.to_dict())
        return
    sites = Table("site", "added", "removed", title=f"{found.kept:,} neurons are in both")
    for site in dict.fromkeys([*found.added, *found.removed]):
        sites.add_row(*cells(site, f"{found.added.get(site, 0):,}", f"{found.removed.get(site, 0):,}"))
    fields = Table("field", *map(Column, cells(found.first, found.second)))
    for name, values in found.fields.items():
        fields.add_row(*cells(name, *("-" if value is None else json.dumps(value) for value in values)))
    OUT.print(sites, fields)


@registry_app.command()
def capacity(
    entry: EntryName,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Show how full each site is after an entry, and of whom.

    Example: neft registry capacity bbc-topic
    """
    with open_registry(location) as registry:
        found = registry.capacity(registry.get(entry, base_model=base_model))
    if json_:
        print_json([each.to_dict() for each in found])
        return
    table = Table("site", "neurons", "free", "owners")
    for each in found:
        owned = ", ".join(f"{name}: {count:,}" for name, count in each.owners.items())
        table.add_row(*cells(each.site, f"{each.size:,}", f"{each.free:,}", owned))
    OUT.print(table)


def _both(registry: Registry, first: str, second: str, base_model: str | None) -> tuple[Entry, Entry]:
    return registry.get(first, base_model=base_model), registry.get(second, base_model=base_model)


# What reads scores, or loads a model


@registry_app.command()
def suggest(
    scores: Annotated[
        str,
        typer.Argument(metavar="SCORES", help="A file that Scores.save wrote, or an entry.", show_default=False),
    ],
    k: HowMany = 5,
    budget: Annotated[float, typer.Option(help="Share of the neurons that the task may train.")] = 0.1,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """List the entries that a task with these scores may start from, as method.transfer ranks them.

    Example: neft registry suggest scores.safetensors -k 3
    """
    with open_registry(location) as registry:
        if Path(scores).is_file():
            from neft.scoring import Scores

            found = registry.suggest(Scores.load(scores), k, budget)
        else:
            found = registry.suggest(registry.get(scores, base_model=base_model), k, budget)
    if json_:
        print_json([each.to_dict() for each in found])
        return
    table = Table("entry", "correlation of scores", "distance of inputs", "intersection over union")
    for each in found:
        evidence = (each.correlation, each.distance, each.iou)
        table.add_row(*cells(each.entry.reference, *("-" if value is None else f"{value:.3f}" for value in evidence)))
    OUT.print(table)


@registry_app.command()
def route(
    entry: EntryName,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Prompts as a task's template renders them.")],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Say which task of an entry's chain each text belongs to.

    Example: neft registry route tweet-sentiment "Review: A delight. Sentiment:"
    """
    with open_registry(location) as registry:
        found = registry.route(texts, registry.get(entry, base_model=base_model), base=base)
    if json_:
        print_json([{"text": text, "entry": name} for text, name in zip(texts, found, strict=True)])
        return
    table = Table("text", "entry")
    for text, name in zip(texts, found, strict=True):
        table.add_row(*cells(text, name or "near no task"))
    OUT.print(table)


# Aliases and tags


@registry_app.command()
def alias(
    task: Annotated[str, typer.Argument(help="A task.", show_default=False)],
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="A name for one of its versions.", show_default=False)],
    version: Annotated[int | None, typer.Option(min=1, help="The version; default: the newest.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Let the alias name nothing any more.")] = False,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Let an alias name a version of a task, whatever it has named before; TASK@ALIAS finds it.

    Example: neft registry alias bbc-topic champion --version 2
    """
    if delete and version is not None:
        raise InputError("--version and --delete exclude each other; give one of them")
    with open_registry(location) as registry:
        if delete:
            registry.delete_alias(task, name, base_model)
            entry = None
        else:
            entry = registry.set_alias(task, name, version, base_model).reference
    if json_:
        print_json({"task": task, "alias": name, "entry": entry})
        return
    said = f"{task} has no alias {name} any more" if entry is None else f"{name} names {entry}"
    OUT.print(cells(said)[0], highlight=False)


@registry_app.command()
def tag(
    entry: EntryName,
    key: Annotated[str, typer.Argument(help="What is noted.", show_default=False)],
    value: Annotated[str | None, typer.Argument(metavar="[VALUE]", help="Its value.", show_default=False)] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Take the tag off.")] = False,
    base_model: BaseModel = None,
    json_: Json = False,
    location: Location = None,
    debug: Debug = False,
) -> None:
    """Note a value under a key of an entry, in place of what was noted there.

    Example: neft registry tag bbc-topic stage production
    """
    if delete == (value is not None):
        raise InputError(f"give tag {key!r} either a value or --delete")
    with open_registry(location) as registry:
        found = registry.get(entry, base_model=base_model)
        if value is None:
            registry.delete_tag(found, key)
        else:
            registry.set_tag(found, key, value)
        noted = dict(registry.tags(found))
    if json_:
        print_json({"entry": found.reference, "tags": noted})
        return
    table = Table("key", "value", title=cells(found.reference)[0])
    for name, each in noted.items():
        table.add_row(*cells(name, each))
    OUT.print(table)
