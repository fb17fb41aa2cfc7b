"""States: a model that steps between its base and the states after each overlay of a chain, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from neft.errors import InputError, nearest
from neft.overlay import Overlay


class States:
    """A base model and the overlays of a chain; `visit` lays on, or takes off, those that lie between two states.

    What each overlay replaced is kept, so that taking it off gives back the state below it bit for bit.

    Example:
        >>> states = States(model, {"films@1": films, "news@1": news})
        >>> states.visit("news@1")  # the base with both overlays laid on
        >>> states.visit(None)  # the base
    """

    def __init__(self, model: nn.Module, overlays: Mapping[str, Overlay]) -> None:
        """
        Args:
            model: the base model, nothing laid on; it is changed in place.
            overlays: state -> the overlay that leads to it from the one before, first laid on first.
        """
        self.model = model
        self._overlays = dict(overlays)
        self._replaced: list[Overlay] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The states after each overlay, in order; the last one has all overlays laid on."""
        return tuple(self._overlays)

    @property
    def here(self) -> str | None:
        """The state that the model is in; None for the base."""
        return self.names[len(self._replaced) - 1] if self._replaced else None

    def visit(self, name: str | None) -> None:
        """Bring the model to a state of the chain; None is the base.

        Raises:
            InputError: no state of that name, or an overlay of another model.
        """
        if name is not None and name not in self._overlays:
            raise InputError(f"no state {name!r} in the chain; {nearest(name, self.names)}")
        target = 0 if name is None else self.names.index(name) + 1
        while len(self._replaced) > target:
            self._replaced[-1].lay_on(self.model)
            self._replaced.pop()
        for overlay in list(self._overlays.values())[len(self._replaced) : target]:
            self._replaced.append(overlay.lay_on(self.model))
