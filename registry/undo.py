"""Undo: one task taken out of a chain, by a new entry that is laid on like any other, so that nothing is lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from neft.errors import FailedError, InputError, nearest
from registry.checkout import check_base, check_state, load_base_of
from registry.records import Entry, NewEntry, learnt_of

# torch and transformers take seconds to import; only what loads a model imports them, when it does.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from neft.audit import AuditResult
    from neft.files import PathLike
    from neft.neurons import NeuronSet
    from neft.overlay import Overlay
    from registry.entries import Registry

#: What becomes of neurons of a forgotten task that later tasks of its chain own too.
Overlaps = Literal["refuse", "last", "sum"]


def forget(
    registry: Registry,
    task: str | Entry,
    *,
    head: str | Entry | None = None,
    overlaps: Overlaps = "refuse",
    base: PathLike | None = None,
) -> Entry:
    """`Registry.forget`."""
    if overlaps not in get_args(Overlaps):
        raise InputError(f"unknown overlaps {overlaps!r}; {nearest(overlaps, get_args(Overlaps))}")
    taken, end = _named(registry, task, head)
    chain = registry.chain(end)
    _check_taken(taken, chain)
    neurons = registry.neurons(taken)
    dependants = _dependants(registry, taken, chain)
    if dependants and overlaps == "refuse":
        listed = ", ".join(f"{reference} ({len(owned & neurons)} neurons)" for reference, owned in dependants.items())
        raise InputError(
            f"{taken.reference} cannot be forgotten: later tasks have changed neurons of it, {listed}; say by "
            "`overlaps` what becomes of those: last leaves them as they are, sum takes back what the task changed"
        )
    how = overlaps if dependants else "refuse"
    digest = _digest(taken, end, how)
    if (known := registry.find(digest)) is not None:
        return known

    model, _ = load_base_of(end, base)
    check_base(end, model)
    change = _Change(taken, chain, {link.reference: registry.overlay(link) for link in chain}, how)
    kept = _united(neurons, list(dependants.values())) if how == "last" else neurons.space.none()
    overlay = change.taken_back(model, kept)
    change.lay_on(model)
    check_state(end, model, "learn the task again")
    audit = _audited(model, overlay)
    return registry.record(_new(taken, end, how, digest, overlay, model, audit))


def _named(registry: Registry, task: str | Entry, head: str | Entry | None) -> tuple[Entry, Entry]:
    """The entry to take out, and the end of the chain to take it out of.

    Raises:
        InputError: no such entry, or several chains go on from it and none is named.
    """
    if head is not None:
        end = registry.get(head) if isinstance(head, str) else head
        if isinstance(task, Entry):
            return task, end
        # A task's name alone means the version that this chain has, not the newest of all.
        learnt = [link for link in registry.chain(end) if link.task == task and link.forgets is None]
        return (learnt[-1] if learnt else registry.get(task, base_model=end.base_model.fingerprint)), end
    taken = registry.get(task) if isinstance(task, str) else task
    ends = registry.ends(taken)
    if len(ends) > 1:
        listed = ", ".join(end.reference for end in ends)
        raise InputError(
            f"{len(ends)} chains go on from {taken.reference}, so name the end of the one that is to forget it as "
            f"`head`: {listed}"
        )
    return taken, ends[0]


def _check_taken(taken: Entry, chain: Sequence[Entry]) -> None:
    """
    Raises:
        InputError: the chain has no such entry, has forgotten it already, or has neurons of several spaces.
    """
    end = chain[-1].reference
    if taken.id not in {link.id for link in chain}:
        raise InputError(f"{taken.reference} is not in the chain of {end}, so it cannot be taken out of it")
    if taken.forgets is not None:
        raise InputError(
            f"{taken.reference} teaches nothing that could be forgotten: it takes {taken.forgets} out of its chain; "
            "check out the entry before it to have that back"
        )
    by = next((link.reference for link in chain if link.forgets == taken.reference), None)
    if by is not None:
        raise InputError(f"{taken.reference} is forgotten already in the chain of {end}, by {by}")
    other = next((link for link in chain if link.space_fingerprint != taken.space_fingerprint), None)
    if other is not None:
        raise InputError(
            f"{taken.reference} cannot be forgotten: {other.reference} of its chain chose from another neuron space, "
            "so it cannot be told which neurons they share"
        )


def _dependants(registry: Registry, taken: Entry, chain: Sequence[Entry]) -> dict[str, NeuronSet]:
    """Reference -> neurons, of the later entries of the chain, not forgotten themselves, that have neurons of it."""
    neurons = registry.neurons(taken)
    later = {link.reference: registry.neurons(link) for link in learnt_of(chain) if link.id > taken.id}
    return {reference: owned for reference, owned in later.items() if len(owned & neurons)}


def _united(neurons: NeuronSet, others: Sequence[NeuronSet]) -> NeuronSet:
    """Those of the neurons that any of the others has too."""
    found = neurons.space.none()
    for other in others:
        found = found | (neurons & other)
    return found


def _digest(taken: Entry, end: Entry, how: Overlaps) -> str:
    described = {"forgets": taken.input_digest, "head": end.input_digest, "overlaps": how}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class _Change:
    """What the rows of a task become when it is taken out of a chain."""

    def __init__(self, taken: Entry, chain: Sequence[Entry], overlays: Mapping[str, Overlay], how: Overlaps):
        self._taken = taken
        self._overlays = overlays
        self._rows = {reference: overlay.neurons.rows() for reference, overlay in overlays.items()}
        self._stays = {link.reference for link in learnt_of(chain)} - {taken.reference}
        #: Entry that is taken out, now or earlier -> whether later changes of its rows are kept as changes.
        self._summed = {link.forgets: link.method.get("overlaps") == "sum" for link in chain if link.forgets}
        self._summed[taken.reference] = how == "sum"
        self._end = chain[-1].reference

    def lay_on(self, model: nn.Module) -> None:
        """Bring the base model to the end of the chain, in place."""
        from neft.states import States

        States(model, self._overlays).visit(self._end)

    def taken_back(self, base: nn.Module, kept: NeuronSet) -> Overlay:
        """The task's rows, as the chain would have them without it.

        Args:
            base: the base model, nothing laid on.
            kept: neurons that stay as they are at the end of the chain.

        Raises:
            FailedError: the changes of several tasks add up to what the weights' dtype cannot hold.
        """
        import torch

        from neft.overlay import Overlay

        neurons = self._overlays[self._taken.reference].neurons
        left = kept.rows()
        values = {}
        for module, originals in Overlay.read(base, neurons).values.items():
            positions = neurons.rows()[module].positions
            stays = np.isin(positions, left[module].positions) if module in left else np.zeros(len(positions), bool)
            without, there = self._walk(module, positions, originals)
            rows = torch.where(torch.from_numpy(stays)[:, None], there, without).to(originals.dtype)
            if not torch.isfinite(rows).all():
                raise FailedError(
                    f"{self._taken.reference} cannot be forgotten by sum: changes of later tasks add up to what "
                    f"{originals.dtype} cannot hold, in module {module!r}; take `overlaps` last"
                )
            values[module] = rows
        return Overlay(neurons, values)

    def _walk(self, module: str, positions: np.ndarray, originals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of a module after all of the chain that stays, and after all of it; float64, which holds each exactly.

        Where a task was taken out by `sum`, a later one adds to a row what it changed there; everywhere else, and where
        it found the row as it would have been anyway, the row becomes what it was after the later one, bit for bit.
        """
        import torch

        without, there = originals.double(), originals.double()
        summed = torch.zeros(len(positions), dtype=torch.bool)
        for reference, rows in self._rows.items():
            if module not in rows:
                continue
            _, *places = np.intersect1d(positions, rows[module].positions, assume_unique=True, return_indices=True)
            here, theirs = (torch.from_numpy(each) for each in places)
            learnt = self._overlays[reference].values[module][theirs].double()
            if reference in self._stays:
                whole = ~summed[here] | (without[here] == there[here]).all(1)
                without[here] = torch.where(whole[:, None], learnt, without[here] + (learnt - there[here]))
            elif reference in self._summed:
                summed[here] = self._summed[reference]
            there[here] = learnt
        return without, there


def _audited(model: nn.Module, overlay: Overlay) -> AuditResult:
    """Lay the rows on, and prove that nothing else has changed.

    Raises:
        FailedError: something else has.
    """
    from neft.audit import Audit

    audit = Audit(model, overlay.neurons)
    overlay.lay_on(model)
    found = audit.compare(model)
    if not found.identical:
        raise FailedError(f"weights outside the task's neurons have changed, such as {found.changed[0]}; report it")
    return found


def _new(
    taken: Entry, end: Entry, how: Overlaps, digest: str, overlay: Overlay, model: nn.Module, audit: AuditResult
) -> NewEntry:
    """All that is recorded of the entry that takes another one out."""
    from neft.audit import state_digest

    return NewEntry(
        task=taken.task,
        stream=end.stream,
        base_model=end.base_model.fingerprint,
        parent=end,
        forgets=taken,
        input_digest=digest,
        seed=taken.seed,
        data_fingerprint=taken.data_fingerprint,
        method={"forget": taken.reference, "overlaps": how},
        training={},
        neurons=overlay.neurons,
        overlay=overlay,
        scores=None,
        state_digest=state_digest(model),
        metrics={},
        audit=audit.to_dict(),
        versions={name: version(name) for name in ("neft", "torch", "transformers")},
    )
