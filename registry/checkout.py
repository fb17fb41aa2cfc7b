"""Checkout: any state of a chain, bit for bit: in memory, as a model's folder, or as a PEFT adapter's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from neft.errors import FailedError, InputError, NeftError
from registry.reading import Reading
from registry.records import Entry, learnt_of

# torch and transformers take seconds to import; only what loads a model imports them, when it does.
if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from neft.files import PathLike
    from neft.neurons import Side
    from neft.overlay import Overlay
    from neft.routing import Router
    from neft.states import States


#: Files that are read and compared at once.
_AT_ONCE = 2


class Checkouts(Reading):
    """Rebuilds the states that entries were recorded for, and proves that they are those."""

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
        entry = self.get(task, version) if isinstance(task, str) else task
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            # The files are read and compared while the model is loaded.
            overlays = [pool.submit(self.overlay, link) for link in self.chain(entry)]
            model, tokenizer = load_base_of(entry, base)
            # A model that is refused is not given to anybody, so that nothing need be kept to mend it.
            _lay(entry, model, [each.result() for each in overlays], verify, keep=False)
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
        _lay(entry, model, [self.overlay(link) for link in self.chain(entry)], verify, keep=True)

    def states(self, entry: Entry, model: nn.Module) -> States:
        """The states of an entry's chain, by reference, for `model` to step between; it stands at the base.

        Args:
            model: the base model, nothing laid on, as `neft.models.load_base` gives it.

        Raises:
            FailedError: a file is missing or damaged.
        """
        from neft.states import States

        return States(model, {link.reference: self.overlay(link) for link in self.chain(entry)})

    def write_model(self, task: str | Entry, folder: PathLike, base: PathLike | None = None) -> Entry:
        """Write the model as it stood after an entry, with its tokenizer, to a folder that transformers loads.

        The folder is loaded again before it gets its name, and is refused unless every weight is as recorded.

        Args:
            task: an entry, or what `get` takes.
            folder: where to; it must not exist.
            base: as `checkout` has it.

        Returns:
            The entry whose state it is.

        Raises:
            InputError: the folder exists, no such entry, or the base model cannot be loaded or is another one.
            FailedError: a file is missing or damaged, the folder cannot be written, or what it holds is not the state
                that was recorded; no folder is left.
        """
        from neft.files import written_folder
        from neft.models import load_base

        refuse_existing(folder)
        entry = self.get(task) if isinstance(task, str) else task
        model, tokenizer = self.checkout(entry, base=base)
        with written_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            # One model at a time in memory.
            del model
            written, _ = load_base(str(temporary), entry.base_model.dtype)
            check_state(entry, written, f"what was written to {folder} cannot be read back; try another disk")
        return entry

    def write_adapter(self, task: str | Entry, folder: PathLike, base: PathLike | None = None) -> Entry:
        """Write what the chain of an entry has changed in the base model as one NEFT adapter, as PEFT saves adapters.

        After `import neft`, `PeftModel.from_pretrained(base_model, folder)` loads it. It is loaded on the base model
        before it gets its name, and is refused unless every weight is as recorded.

        Args:
            task: an entry, or what `get` takes.
            folder: where to; it must not exist.
            base: as `checkout` has it.

        Returns:
            The entry whose state it is.

        Raises:
            InputError: the folder exists, no such entry, a chain that has changed both rows and columns of one matrix,
                or the base model cannot be loaded or is another one.
            FailedError: as `write_model` has it.
        """
        from peft import PeftModel

        from neft.files import written_folder

        refuse_existing(folder)
        entry = self.get(task) if isinstance(task, str) else task
        model, _ = load_base_of(entry, base)
        check_base(entry, model)
        overlays = {link.reference: self.overlay(link) for link in self.chain(entry)}
        with written_folder(folder) as temporary:
            adapted = _adapted(model, overlays)
            adapted.save_pretrained(str(temporary))
            plain = adapted.unload()
            check_state(
                entry,
                PeftModel.from_pretrained(plain, str(temporary)).merge_and_unload(),
                f"what was written to {folder} cannot be read back; try another disk",
            )
        return entry

    def router(self, task: str | Entry, version: int | None = None) -> Router:
        """Finds which entry of a chain a request belongs to, by reference; what was forgotten is never found.

        Args:
            task: the entry whose chain it is, or what `get` takes.
            version: the version, for a task's name.

        Raises:
            InputError: no such entry, or an entry of the chain was recorded without a signature.
            FailedError: a file is missing, truncated or altered.
        """
        from neft.routing import Router

        entry = self.get(task, version) if isinstance(task, str) else task
        signatures = {link.reference: self.signature(link) for link in learnt_of(self.chain(entry))}
        unsigned = [reference for reference, signature in signatures.items() if signature is None]
        if unsigned:
            raise InputError(
                f"{unsigned[0]} was recorded without a signature, so requests cannot be routed to it; learn the stream "
                "again in a new registry"
            )
        return Router({reference: signature for reference, signature in signatures.items() if signature is not None})


def _lay(entry: Entry, model: nn.Module, overlays: Sequence[Overlay], verify: bool, keep: bool) -> None:
    """Lay a chain's overlays on, and compare the model before and after with what was recorded.

    Args:
        keep: what they replace, so that a model that is refused is left as it was.
    """
    from neft.audit import base_fingerprint, digests_around
    from neft.overlay import Layers

    layers = Layers(model, overlays, keep)
    change = {weight: partial(layers.lay_on, name) for weight, name in layers.weights.items()}
    if not verify:
        for work in change.values():
            work()
        return
    before, after = digests_around(model, change)
    try:
        _check_fingerprint(entry, base_fingerprint(model, before))
        _check_digest(entry, after, "learn the task again")
    except NeftError:
        layers.take_off()
        raise


def load_base_of(entry: Entry, base: PathLike | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an entry's chain begins with, from where it was loaded or where it is now; not compared yet.

    Raises:
        InputError: it cannot be loaded.
    """
    from neft.models import load_base

    name = str(base) if base is not None else entry.base_model.name
    try:
        return load_base(name, entry.base_model.dtype)
    except InputError as error:
        raise InputError(
            f"the base model of {entry.reference} cannot be loaded; give the folder it is in now as `base`: {error}"
        ) from error


def check_base(entry: Entry, model: nn.Module) -> None:
    """
    Raises:
        InputError: `model` is not the base model of the entry, untouched.
    """
    from neft.audit import base_fingerprint

    _check_fingerprint(entry, base_fingerprint(model))


def _check_fingerprint(entry: Entry, found: str) -> None:
    if found != entry.base_model.fingerprint:
        raise InputError(
            f"{entry.reference} was learnt on base model {entry.base_model.name!r} "
            f"({entry.base_model.fingerprint[:12]}), but the one given is {found[:12]}; give that base model"
        )


def check_state(entry: Entry, model: nn.Module, advice: str) -> None:
    """
    Raises:
        FailedError: the model is not, bit for bit, in the state that was recorded; `advice` says what to do.
    """
    from neft.audit import state_digest

    _check_digest(entry, state_digest(model), advice)


def _check_digest(entry: Entry, found: str, advice: str) -> None:
    if found != entry.state_digest:
        raise FailedError(
            f"{entry.reference} cannot be rebuilt: the weights' digest is {found[:12]}, recorded is "
            f"{entry.state_digest[:12]}; {advice}"
        )


def refuse_existing(path: PathLike) -> None:
    """
    Raises:
        InputError: there is something at `path`, where a command is to write.
    """
    if Path(path).exists():
        raise InputError(f"{path} exists already; name a new one")


def _adapted(model: PreTrainedModel, overlays: Mapping[str, Overlay]) -> PeftModel:
    """A base model in an adapter of every row that a chain's overlays have, the newest of each."""
    import torch
    from peft import get_peft_model

    from neft.neurons import ModuleRows
    from neft.tuner import NeftConfig, NeftLinear

    united = _united(model, overlays)
    spaces = {overlay.neurons.space.fingerprint for overlay in overlays.values()}
    config = NeftConfig(
        rows={name: len(rows) for name, (side, _, rows) in united.items() if side == "row"},
        columns={name: len(rows) for name, (side, _, rows) in united.items() if side == "column"},
        space=spaces.pop() if len(spaces) == 1 else None,
        task_type="CAUSAL_LM",
    )
    config.positions = {name: ModuleRows(side, positions.numpy()) for name, (side, positions, _) in united.items()}
    # In the dtype of the weights, which loses nothing, takes half of float32's room, and is what a checkout compares.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, (_, _, rows) in united.items():
            layer = cast(NeftLinear, adapted.get_base_model().get_submodule(name))
            layer.neft_rows["default"].copy_(rows)
    return adapted


def _united(model: nn.Module, overlays: Mapping[str, Overlay]) -> dict[str, tuple[Side, torch.Tensor, torch.Tensor]]:
    """Module name -> side, sorted positions and rows of all overlays together; rows of later ones win.

    Raises:
        InputError: the rows of a module's matrix were changed, and its columns too.
    """
    import torch

    from neft.overlay import Change, read_rows, unite

    changes: dict[str, list[Change]] = {}
    sides: dict[str, Side] = {}
    for reference, overlay in overlays.items():
        for name, chosen in overlay.neurons.rows().items():
            if sides.setdefault(name, chosen.side) != chosen.side:
                raise InputError(
                    f"{reference} changes the {chosen.side}s of module {name!r} and an earlier entry its "
                    f"{sides[name]}s, which one adapter cannot hold; check out the whole model instead"
                )
            positions = torch.from_numpy(chosen.positions.copy())
            changes.setdefault(name, []).append(Change(positions, overlay.values[name]))
    return {
        name: (side, *unite(changes[name], "last", partial(read_rows, model.get_submodule(name), side)))
        for name, side in sides.items()
    }
