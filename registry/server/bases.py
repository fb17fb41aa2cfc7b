"""The base model that requests are routed by: loaded when it is first needed, and kept."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from registry import Entry, Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Bases:
    """Holds the last base model that was used; one request at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def route(self, registry: Registry, entry: Entry, text: str) -> str | None:
        """The entry of the chain of `entry` that a text belongs to; None where it is near none.

        Raises:
            InputError: the base model cannot be loaded or is another one, or an entry has no signature.
            FailedError: a signature is missing or damaged.
        """
        router = registry.router(entry)
        with self._lock:
            model, tokenizer = self._base(entry)
            [found] = router.route(model, tokenizer, [text])
        return found

    def _base(self, entry: Entry) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from registry.checkout import check_base, load_base_of

        fingerprint = entry.base_model.fingerprint
        if self._kept is None or self._kept[0] != fingerprint:
            self._kept = None  # two need not be held at once
            model, tokenizer = load_base_of(entry, None)
            check_base(entry, model)
            self._kept = (fingerprint, model, tokenizer)
        return self._kept[1:]
