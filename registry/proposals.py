"""Proposals: what earlier entries a new task may start from, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr

from neft.errors import InputError
from neft.neurons import NeuronSet, NeuronSpace
from neft.routing import Signature
from neft.scoring import Scores
from registry.reading import Reading
from registry.records import Entry


@dataclass(frozen=True)
class Proposal:
    """An entry that a new task may start from, and the evidence for it.

    Attributes:
        correlation: Spearman's, of the entry's scores with the new task's: its mean over sites, -1 to 1; None where
            the entry has no scores.
        distance: of the signatures of their inputs, 0 to 2; None where either has none.
        iou: intersection over union of the entry's neurons and those that the new task would choose.
    """

    entry: Entry
    correlation: float | None
    distance: float | None
    iou: float

    def to_dict(self) -> dict[str, Any]:
        """The proposal as JSON has it."""
        evidence = {"correlation": self.correlation, "distance": self.distance, "iou": self.iou}
        return {"entry": self.entry.reference, "input_digest": self.entry.input_digest} | evidence


def eligible(
    registry: Reading, stream: str, base_model: str, space: NeuronSpace, last: int, source: str = "auto"
) -> Sequence[Entry]:
    """The entries that tasks of a run may start from: on the same base model and neuron space.

    Args:
        stream: the run's own, whose entries `auto` leaves out: a task that was learnt in it before is recalled by its
            inputs, of which these entries are one, and must not change them.
        base_model: its fingerprint.
        last: id of the last entry that was recorded before the run began; later ones are left out, so that a run
            that goes on after a crash sees what it saw at first.
        source: `auto`, or the one entry to take: a task, the newest version of those, or `task@version`.

    Raises:
        InputError: no such entry among them.
    """
    found = [
        entry
        for entry in registry.list()
        if entry.id <= last
        and entry.base_model.fingerprint == base_model
        and entry.space_fingerprint == space.fingerprint
        # What takes an entry out of its chain has learnt nothing.
        and entry.forgets is None
    ]
    if source == "auto":
        return [entry for entry in found if entry.stream != stream]
    named = [entry for entry in found if source in (entry.task, entry.reference)]
    if not named:
        known = sorted({entry.task for entry in found})
        raise InputError(
            f"method.transfer names {source!r}, which was not recorded on this base model and neuron space before the "
            f"run began; " + (f"known: {', '.join(known)}" if known else "nothing was, so set it to auto or none")
        )
    return [max(named, key=lambda entry: entry.version)]


def propose(
    registry: Reading,
    entries: Sequence[Entry],
    scores: Scores,
    chosen: NeuronSet,
    signature: Signature | None = None,
) -> list[Proposal]:
    """The entries, the one first that is most like the new task; of equals the newer one.

    They are ranked by each kind of evidence that there is, and by the mean of those ranks.

    Args:
        scores: the new task's.
        chosen: the neurons that the new task would choose by itself.
        signature: what tells the new task's inputs from others', where it is known.
    """
    found = [
        Proposal(
            entry,
            correlation(registry.scores(entry), scores),
            _distance(registry.signature(entry), signature),
            registry.neurons(entry).iou(chosen),
        )
        for entry in entries
    ]
    kinds: list[Callable[[Proposal], float | None]] = [
        lambda each: None if each.correlation is None else -each.correlation,
        lambda each: each.distance,
        lambda each: -each.iou,
    ]
    ranks = {each.entry.id: 0 for each in found}
    for kind in kinds:
        values = {each.entry.id: kind(each) for each in found}
        # Those without this evidence come last.
        ordered = sorted({math.inf if value is None else value for value in values.values()})
        for number, value in values.items():
            ranks[number] += ordered.index(math.inf if value is None else value)
    return sorted(found, key=lambda each: (ranks[each.entry.id], -each.entry.id))


def correlation(earlier: Scores | None, new: Scores) -> float | None:
    """Spearman's, of two tasks' scores: its mean over sites; None where there is nothing to compare."""
    if earlier is None:
        return None
    found = [
        float(spearmanr(earlier.values[site.name].numpy(), new.values[site.name].numpy()).statistic)
        for site in new.space.sites
    ]
    # Where all of a site's scores are equal, they say nothing.
    known = [value for value in found if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _distance(earlier: Signature | None, new: Signature | None) -> float | None:
    """1 - cosine of the means of the inputs' features; None where they are not known, or not of one kind."""
    if earlier is None or new is None or earlier.mean.shape != new.mean.shape:
        return None
    return float(1 - torch.cosine_similarity(earlier.mean.double(), new.mean.double(), dim=0))
