"""Look-ups: who owns which neurons, what entries have in common and what came of them, and where a task may start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from neft.errors import InputError, NotFoundError, nearest
from registry.answers import (
    Difference,
    Found,
    Lineage,
    Link,
    Near,
    Overlap,
    OverlapMatrix,
    Owner,
    SiteCapacity,
    Strong,
    TaskSummary,
)
from registry.bitmaps import Numbering, bitmap_of, read, union_of
from registry.checkout import Checkouts, load_base_of
from registry.index import Held, Index
from registry.queries import is_base
from registry.records import Entry, learnt_of
from registry.schema import AliasRow, BaseModelRow, EntryRow, MetricRow, NeuronSetRow, NeuronSpaceRow, TagRow, TaskRow
from registry.search import Search

# torch takes seconds to import; only what reads scores or loads a model imports it, when it does.
if TYPE_CHECKING:
    from pyroaring import FrozenBitMap

    from neft.files import PathLike
    from neft.neurons import NeuronSet
    from neft.scoring import Scores
    from registry.proposals import Proposal

__all__ = [
    "Difference",
    "Found",
    "Lineage",
    "Lookups",
    "Near",
    "Overlap",
    "OverlapMatrix",
    "Owner",
    "SiteCapacity",
    "Strong",
    "TaskSummary",
]

#: Fields of an entry that `diff` compares, key by key where they are mappings.
_COMPARED = ("stream", "seed", "data_fingerprint", "method", "training", "metrics")


#: Id, task and version of an entry, and the ids of its parent, of what it was reused from, and of what it forgets.
_Linked = tuple[int, str, int, int | None, int | None, int | None]


class Lookups(Checkouts):
    """Answers about all that is recorded. An entry is given as itself, or as `Registry.get` takes it."""

    _index: Index

    # Entries

    def tasks(self) -> Sequence[TaskSummary]:
        """Every task on every base model, by name."""
        counted = select(
            EntryRow.task_id, func.count(EntryRow.id).label("versions"), func.max(EntryRow.version).label("version")
        )
        last = counted.group_by(EntryRow.task_id).subquery()
        newest = (
            select(TaskRow.id, TaskRow.name, BaseModelRow.fingerprint, BaseModelRow.name.label("base"), last.c.versions)
            .add_columns(EntryRow.version, EntryRow.neuron_count, MetricRow.value.label("score"))
            .join(BaseModelRow, TaskRow.base_model_id == BaseModelRow.id)
            .join(last, last.c.task_id == TaskRow.id)
            .join(EntryRow, (EntryRow.task_id == TaskRow.id) & (EntryRow.version == last.c.version))
            .outerjoin(MetricRow, (MetricRow.entry_id == EntryRow.id) & (MetricRow.name == "scores/" + TaskRow.name))
        )
        streams = select(EntryRow.task_id, EntryRow.stream).distinct()
        aliases = select(AliasRow.task_id, AliasRow.name, EntryRow.version)
        aliases = aliases.join(EntryRow, AliasRow.entry_id == EntryRow.id)
        tags = (
            select(EntryRow.task_id, TagRow.key, TagRow.value).join(EntryRow, TagRow.entry_id == EntryRow.id).distinct()
        )
        learnt_by: dict[int, list[str]] = {}
        aliased: dict[int, dict[str, int]] = {}
        tagged: dict[int, list[str]] = {}
        with self._database.reading() as session:
            # First: of a task that is recorded meanwhile, the others may say more, but not less.
            rows = session.execute(newest).all()
            for task_id, stream in session.execute(streams):
                learnt_by.setdefault(task_id, []).append(stream)
            for task_id, alias, version in session.execute(aliases):
                aliased.setdefault(task_id, {})[alias] = version
            for task_id, key, value in session.execute(tags):
                tagged.setdefault(task_id, []).append(f"{key}={value}")
        return [
            TaskSummary(
                name=row.name,
                base_model=row.fingerprint,
                base_model_name=row.base,
                versions=row.versions,
                newest=f"{row.name}@{row.version}",
                neurons=row.neuron_count,
                score=row.score,
                streams=tuple(sorted(learnt_by[row.id])),
                aliases=dict(sorted(aliased.get(row.id, {}).items())),
                tags=tuple(sorted(tagged.get(row.id, []))),
            )
            for row in sorted(rows, key=lambda row: (row.name, row.id))
        ]

    def search(
        self,
        filter: str = "",  # noqa: A002 - as MLflow calls it
        *,
        order_by: Sequence[str] = (),
        max_results: int = 1000,
        page_token: str | None = None,
    ) -> Found:
        """The entries that a filter fits, the newest first unless `order_by` says otherwise.

        Args:
            filter: such as ``task = 'film' AND metrics.`scores/film` >= 0.8 AND alias = 'champion'``; `registry.search`
                tells all of it.
            order_by: such as ``metrics.accuracy DESC`` and ``created``.
            max_results: entries at most, 1 and up.
            page_token: the `next_token` of the page before, of the same search.

        Raises:
            InputError: the filter cannot be read; says where and what was expected.
        """
        search = Search.of(filter, order_by)
        with self._database.reading() as session:
            rows, token = search.page(session, max_results, page_token)
            return Found(tuple(Entry.from_row(row) for row in rows), token)

    def learnt(self, entry: str | Entry) -> Sequence[Entry]:
        """What a chain's state still knows: its entries without those that were forgotten, and that forget them."""
        return learnt_of(self.chain(self._entry(entry)))

    def lineage(self, entry: str | Entry) -> Lineage:
        """The tree that an entry stands in, from its root down.

        Raises:
            InputError: no such entry.
        """
        found = self._entry(entry)
        query = select(
            EntryRow.id,
            TaskRow.name,
            EntryRow.version,
            EntryRow.parent_id,
            EntryRow.reused_from_id,
            EntryRow.forgets_id,
        )
        query = query.join(TaskRow, EntryRow.task_id == TaskRow.id).join(BaseModelRow)
        query = query.where(BaseModelRow.fingerprint == found.base_model.fingerprint)
        with self._database.reading() as session:
            rows = session.execute(query).tuples().all()
        return _tree(found.id, rows)

    # Neurons

    def owners(
        self, site: str, neuron: int | None = None, *, base_model: str | None = None, space: str | None = None
    ) -> Sequence[Owner]:
        """The entries that own a neuron, or any neuron of a site, in the order they were recorded.

        Args:
            neuron: its number in the site; None for all of the site.
            base_model: name of the base model, or how its fingerprint begins; needed when several have such a site.
            space: fingerprint of the neuron space, of which base model's entries there may be several.

        Raises:
            InputError: no such site or neuron, or several base models.
        """
        with self._database.reading() as session:
            spaces = self._spaces_with(session, site, neuron, space)
            held = [self._index.held(session, each) for each in spaces]
            base = _one_base(session, {base for each in held for base in each.bases}, site, base_model)
        found = [each for of_space in held for each in _owners(of_space, site, neuron, base)]
        return [owner for _, owner in sorted(found, key=lambda each: each[0])]

    def _spaces_with(self, session: Session, site: str, neuron: int | None, space: str | None) -> Sequence[str]:
        """The neuron spaces that have such a neuron."""
        query = select(NeuronSpaceRow.fingerprint).order_by(NeuronSpaceRow.fingerprint)
        known = [each for each in session.scalars(query) if space is None or each.startswith(space)]
        if not known:
            raise NotFoundError(
                "nothing has been recorded yet" if space is None else f"no neuron space {space!r} in the registry"
            )
        numberings = [self._index.numbering(session, each) for each in known]
        named = [each for each in numberings if each.has(site)]
        if not named:
            names = {each.name for numbering in numberings for each in numbering.sites}
            raise NotFoundError(f"no site {site!r} in the registry; {nearest(site, names)}")
        if neuron is None:
            return [each.fingerprint for each in named]
        found = [each.fingerprint for each in named if 0 <= neuron < each.site(site).size]
        if not found:
            named[0].number(site, neuron)  # says how many the site has
        return found

    def overlap(self, first: str | Entry, second: str | Entry) -> Overlap:
        """What two entries' sets have in common.

        Raises:
            InputError: no such entry, or sets of different neuron spaces.
        """
        entries, numbering, (one, other) = self._bitmaps([first, second])
        both = one & other
        union = len(one) + len(other) - len(both)
        return Overlap(
            first=entries[0].reference,
            second=entries[1].reference,
            shared=len(both),
            only_first=len(one) - len(both),
            only_second=len(other) - len(both),
            iou=len(both) / union if union else 1.0,
            sites=numbering.counts(both),
        )

    def overlaps(self, stream: str | None = None, entries: Sequence[str | Entry] | None = None) -> OverlapMatrix:
        """What entries have in common, each with each.

        Args:
            stream: the newest version of each of this stream's tasks, in the order they were learnt.
            entries: these, instead.

        Raises:
            InputError: neither or both are given, no such stream or entry, or sets of different neuron spaces.
        """
        if (stream is None) == (entries is None):
            raise InputError("give either a stream or entries to compare")
        found, _, bitmaps = self._bitmaps(self._newest_of(stream) if stream is not None else entries or ())
        sizes = [len(each) for each in bitmaps]
        shared = [[0] * len(bitmaps) for _ in bitmaps]
        for row, one in enumerate(bitmaps):
            for column in range(row + 1):
                shared[row][column] = shared[column][row] = one.intersection_cardinality(bitmaps[column])
        return OverlapMatrix(
            entries=tuple(entry.reference for entry in found),
            sizes=tuple(sizes),
            shared=tuple(map(tuple, shared)),
            iou=tuple(
                tuple(
                    both / (sizes[row] + sizes[column] - both) if sizes[row] + sizes[column] else 1.0
                    for column, both in enumerate(counts)
                )
                for row, counts in enumerate(shared)
            ),
        )

    def diff(self, first: str | Entry, second: str | Entry) -> Difference:
        """What the second entry has otherwise than the first: its neurons, and how it was learnt.

        Raises:
            InputError: no such entry, or sets of different neuron spaces.
        """
        (before, after), numbering, (one, other) = self._bitmaps([first, second])
        old, new = (
            {name: value for field in _COMPARED for name, value in _flat(field, getattr(entry, field))}
            for entry in (before, after)
        )
        return Difference(
            first=before.reference,
            second=after.reference,
            added=numbering.counts(other - one),
            removed=numbering.counts(one - other),
            kept=one.intersection_cardinality(other),
            fields={
                name: (old.get(name), new.get(name))
                for name in sorted(old.keys() | new.keys())
                if old.get(name) != new.get(name)
            },
        )

    def capacity(self, entry: str | Entry) -> Sequence[SiteCapacity]:
        """Who owns how much of each site in an entry's state, and what is free; forgotten entries own nothing.

        Raises:
            InputError: no such entry.
        """
        state = self._entry(entry)
        owners = [each for each in self.learnt(state) if each.space_fingerprint == state.space_fingerprint]
        # The state itself names the space, where nothing is left in it.
        entries, numbering, bitmaps = self._bitmaps([state, *owners])
        counts = {each.reference: numbering.counts(bits) for each, bits in zip(entries[1:], bitmaps[1:], strict=True)}
        taken = numbering.counts(union_of(bitmaps[1:]))
        return [
            SiteCapacity(
                site=site.name,
                layer=site.layer,
                kind=site.kind,
                size=site.size,
                owners={name: found[site.name] for name, found in counts.items() if site.name in found},
                free=site.size - taken.get(site.name, 0),
            )
            for site in numbering.sites
        ]

    def nearest(
        self, to: str | Entry | NeuronSet | Scores, k: int = 10, *, by: Literal["neurons", "scores"] = "neurons"
    ) -> Sequence[Near]:
        """The entries that are most like an entry, a set or scores, of the same neuron space; of equals the newer.

        Args:
            to: an entry, whose base model's other entries are compared; a neuron set; or scores, which are compared
                with the entries' scores by Spearman's correlation (its mean over sites), instead of the sets by
                intersection over union.
            k: how many, 1 and up.
            by: whether an entry is compared by its neurons or by its scores.

        Raises:
            InputError: no such entry, it was recorded without scores, or `k` is less than 1.
        """
        if k < 1:
            raise InputError(f"k is {k}; ask for 1 entry or more")
        if isinstance(to, str):
            to = self.get(to)
        if isinstance(to, Entry) and by == "scores":
            base = to.base_model
            return self._nearest_scores(self._scores_of(to), k, lambda each: each.base_model == base and each != to)
        if isinstance(to, Entry):
            return self._nearest_sets(to, None, k)
        from neft.neurons import NeuronSet

        if isinstance(to, NeuronSet):
            return self._nearest_sets(None, to, k)
        return self._nearest_scores(to, k, lambda _: True)

    def _nearest_sets(self, entry: Entry | None, neurons: NeuronSet | None, k: int) -> Sequence[Near]:
        with self._database.reading() as session:
            if entry is not None:
                held = self._index.held(session, entry.space_fingerprint)
                own = held.place(entry.id)
                wanted = held.bitmaps[own]
            elif neurons is not None and session.get(NeuronSpaceRow, neurons.space.fingerprint) is not None:
                held, own, wanted = self._index.held(session, neurons.space.fingerprint), None, bitmap_of(neurons)
            else:
                return []
        # A tight loop: with ten thousand sets it is all that takes time.
        shared = np.fromiter(map(wanted.intersection_cardinality, held.bitmaps), np.int64, len(held.bitmaps))
        union = held.sizes + len(wanted) - shared
        iou = np.where(union > 0, shared / np.maximum(union, 1), 1.0)
        if own is not None:
            iou[own] = -1
            iou[np.array(held.bases) != held.bases[own]] = -1
        best = np.lexsort((-np.array(held.ids), -iou))[:k]
        return [
            Near(held.references[place], held.tasks[place], float(iou[place]))
            for place in best.tolist()
            if iou[place] >= 0
        ]

    def _nearest_scores(self, scores: Scores, k: int, among: Callable[[Entry], bool]) -> Sequence[Near]:
        from registry.proposals import correlation

        found = []
        for entry in filter(among, self._of_space(scores.space.fingerprint)):
            value = correlation(self.scores(entry), scores)
            if value is not None:
                found.append((-value, -entry.id, Near(entry.reference, entry.task, value)))
        return [near for _, _, near in sorted(found, key=lambda each: each[:2])[:k]]

    # What reads scores, or loads a model

    def strongest(self, entry: str | Entry, k: int = 20) -> Sequence[Strong]:
        """The neurons that an entry's task scored highest, whether its set has them or not.

        Raises:
            InputError: no such entry, or it was recorded without scores.
            FailedError: the file is missing, truncated or altered.
        """
        import torch

        found = self._entry(entry)
        scores, owned = self._scores_of(found), self.neurons(found)
        numbering = Numbering.of(scores.space.fingerprint, scores.space.to_dict())
        values = torch.cat([scores.values[site.name] for site in numbering.sites])
        # A stable sort, so that of equal scores the earlier neuron comes first.
        order = torch.argsort(values, descending=True, stable=True)[: max(k, 0)]
        strongest = []
        for number in order.tolist():
            site, neuron = numbering.neuron(number)
            strongest.append(Strong(site, neuron, float(values[number]), neuron in owned[site]))
        return strongest

    def suggest(self, scores: str | Entry | Scores, k: int = 5, budget: float = 0.1) -> Sequence[Proposal]:
        """The entries that a task with these scores may start from, as `method.transfer` ranks them.

        Args:
            scores: the task's; of an entry, those that it was chosen by, and the entry itself is left out.
            k: how many at most.
            budget: share of the neurons that the task may train, or how many.

        Raises:
            InputError: no such entry, it was recorded without scores, or the budget is outside its range.
            FailedError: a file is missing, truncated or altered.
        """
        from pydantic import ValidationError

        from neft.selection import Budget, select
        from registry.proposals import propose

        entry = self.get(scores) if isinstance(scores, str) else scores if isinstance(scores, Entry) else None
        given = self._scores_of(entry) if entry is not None else cast("Scores", scores)
        try:
            allowed = Budget(neurons=budget)
        except ValidationError as error:
            raise InputError(f"budget {budget}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
        chosen = select(given, allowed).neurons
        among = [
            each
            for each in self._of_space(given.space.fingerprint)
            if each.forgets is None and (entry is None or (each.base_model == entry.base_model and each.id != entry.id))
        ]
        signature = self.signature(entry) if entry is not None else None
        return propose(self, among, given, chosen, signature)[: max(k, 0)]

    def route(
        self, text: str | Sequence[str], entry: str | Entry, *, base: PathLike | None = None
    ) -> Sequence[str | None]:
        """Which entry of a chain each text belongs to, by reference; None where it is near none.

        Args:
            text: a prompt as a task's template renders it, or several.
            entry: the entry whose chain it is.
            base: where the base model is now, if no longer where it was loaded from.

        Raises:
            InputError: no such entry, one of the chain was recorded without a signature, or no base model.
            FailedError: a file is missing, truncated or altered.
        """
        found = self._entry(entry)
        router = self.router(found)
        model, tokenizer = load_base_of(found, base)
        return router.route(model, tokenizer, [text] if isinstance(text, str) else list(text))

    # Helpers

    def _entry(self, entry: str | Entry) -> Entry:
        return self.get(entry) if isinstance(entry, str) else entry

    def _scores_of(self, entry: Entry) -> Scores:
        scores = self.scores(entry)
        if scores is None:
            raise InputError(f"{entry.reference} was recorded without scores; name an entry that has them")
        return scores

    def _of_space(self, space: str) -> Sequence[Entry]:
        query = select(EntryRow).where(EntryRow.space_fingerprint == space).order_by(EntryRow.id)
        with self._database.reading() as session:
            return [Entry.from_row(row) for row in session.scalars(query)]

    def _newest_of(self, stream: str) -> Sequence[Entry]:
        newest: dict[int | str, Entry] = {}
        for entry in self.list(stream):
            if entry.forgets is None:
                newest.pop(entry.task, None)  # so that its place is that of its newest version
                newest[entry.task] = entry
        if not newest:
            with self._database.reading() as session:
                known = session.scalars(select(EntryRow.stream).distinct()).all()
            hint = nearest(stream, known) if known else "nothing has been recorded yet"
            raise NotFoundError(f"no stream {stream!r} in the registry; {hint}")
        return list(newest.values())

    def _bitmaps(self, entries: Sequence[str | Entry]) -> tuple[Sequence[Entry], Numbering, Sequence[FrozenBitMap]]:
        """The entries, how their space is numbered, and their sets.

        Raises:
            InputError: no such entry, none at all, or sets of different neuron spaces.
        """
        found = [self._entry(each) for each in entries]
        if not found:
            raise InputError("no entries are given; name one or more")
        for other in found[1:]:
            if other.space_fingerprint != found[0].space_fingerprint:
                raise InputError(
                    f"{found[0].reference} and {other.reference} are of different neuron spaces "
                    f"({found[0].space_fingerprint[:12]} and {other.space_fingerprint[:12]}), whose neurons have "
                    "nothing in common; compare entries of the same model shape and kinds"
                )
        with self._database.reading() as session:
            space = session.get_one(NeuronSpaceRow, found[0].space_fingerprint)
            numbering = Numbering.of(space.fingerprint, space.description)
            ids = {each.id: each.reference for each in found}
            query = select(NeuronSetRow.entry_id, NeuronSetRow.bitmap).where(NeuronSetRow.entry_id.in_(ids))
            bitmaps = {
                entry_id: read(content, numbering, ids[entry_id]) for entry_id, content in session.execute(query)
            }
        return found, numbering, [bitmaps[each.id] for each in found]


def _one_base(session: Session, bases: Collection[int], site: str, base_model: str | None) -> int | None:
    """The id of the base model that is meant; None where nothing is recorded of any.

    Raises:
        InputError: several may be meant, or none is.
    """
    rows = session.scalars(select(BaseModelRow).where(BaseModelRow.id.in_(bases)).order_by(BaseModelRow.id)).all()
    chosen = [row for row in rows if base_model is None or is_base(row, base_model)]
    if len(chosen) == 1:
        return chosen[0].id
    known = ", ".join(f"{row.fingerprint[:12]} ({row.name})" for row in rows)
    if chosen:
        raise InputError(f"several base models have site {site!r}; name one by its fingerprint: {known}")
    if base_model is not None:
        raise NotFoundError(f"no base model {base_model!r} has entries with site {site!r}; those are {known or 'none'}")
    return None


def _owners(held: Held, site: str, neuron: int | None, base: int | None) -> Iterator[tuple[int, Owner]]:
    """Id and owner, of the entries of a base model that own the neuron, or any of the site."""
    if neuron is None:
        area = held.numbering.site(site)
        counts = [bitmap.range_cardinality(area.start, area.stop) for bitmap in held.bitmaps]
    else:
        number = held.numbering.number(site, neuron)
        counts = [int(number in bitmap) for bitmap in held.bitmaps]
    for place, count in enumerate(counts):
        if count and held.bases[place] == base:
            yield held.ids[place], Owner(held.references[place], held.tasks[place], count)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a mapping of mappings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def _tree(entry_id: int, rows: Sequence[_Linked]) -> Lineage:
    """The tree that an entry stands in, of all entries and their links."""
    by_id = {row[0]: row for row in rows}
    links = {row[0]: _links(row) for row in rows}
    root = entry_id
    while links[root]:
        root = next(iter(links[root]))
    below: dict[int, list[int]] = {}
    for each, above in sorted(links.items()):
        for other in above:
            below.setdefault(other, []).append(each)

    def stands(each: int, under: int) -> bool:
        return next(iter(links[each])) == under

    tree, left = [], [root]
    while left:
        tree.append(left.pop())
        left += [each for each in below.get(tree[-1], ()) if stands(each, tree[-1])]
    children: dict[int, tuple[Lineage, ...]] = {}
    # What came of an entry was recorded after it.
    for each in sorted(tree, reverse=True):
        children[each] = tuple(
            Lineage(_reference(by_id[child]), links[child][each], children[child] if stands(child, each) else ())
            for child in below.get(each, ())
        )
    return Lineage(_reference(by_id[root]), None, children[root])


def _links(row: _Linked) -> dict[int, Link]:
    """Id -> what the entry is to the one of that id. The first is the one that it stands under in a tree."""
    _, _, _, parent, reused_from, forgets = row
    found: dict[int, Link] = {}
    for other, link in ((parent, "parent"), (reused_from, "reused from"), (forgets, "forgets")):
        if other is not None:
            found.setdefault(other, cast("Link", link))
    return found


def _reference(row: _Linked) -> str:
    return f"{row[1]}@{row[2]}"
