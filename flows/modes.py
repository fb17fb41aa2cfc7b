"""Modes: a stream's scores when each request names its task, and when a router finds it, beside one model for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from neft.audit import state_digest
from neft.errors import FailedError
from neft.evaluation import Mode
from neft.forgetting import FORMULAS, AccuracyMatrix
from neft.routing import Router, Signature
from neft.states import States
from neft.tasks import Task
from registry import Entry

#: One task's score on each of its evaluation examples, in the task's order.
Values = Sequence[float]

#: Numbers of the routed mode alone -> what they are.
ROUTING = {
    "routed/accuracy": "share of the learnt tasks' evaluation prompts that are sent to their own task",
    "routed/none_near": "share of them that are near no task, and so are sent to the newest state",
    "routed/signature_bytes": "bytes of the learnt tasks' signatures",
    "routed/seconds_per_request": "seconds to find the task of an evaluation prompt, read in batches",
}


def formula_of(name: str) -> str:
    """The formula of a metric, in whatever mode."""
    return ROUTING.get(name) or FORMULAS[name.rpartition("/")[2]]


class Modes:
    """The stream's scores on the states that each mode chooses.

    Every state is measured on every task as the stream goes on, so that a mode takes its values from there: `oracle`
    those of the state right after the task was learnt, `routed`, for each example, those of the state that it is sent
    to. A task that is not learnt yet has neither.
    """

    def __init__(self, modes: Sequence[Mode], matrix: AccuracyMatrix):
        """
        Args:
            matrix: the R matrix before its first row.
        """
        self.matrices: dict[Mode, AccuracyMatrix] = {mode: matrix for mode in modes if mode != "consolidated"}
        self._names = matrix.tasks
        self._states: list[Sequence[Values]] = []
        self._signatures: Sequence[Signature] = ()
        self._requests: Sequence[torch.Tensor] = ()
        self._reading = 0.0
        self._routing: dict[str, float] = {}

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        signatures: Sequence[Signature],
    ) -> None:
        """Read every task's evaluation prompts, as a router does, by the untouched model."""
        start = time.perf_counter()
        self._signatures = signatures
        self._requests = [
            signature.read(model, tokenizer, task.eval) for task, signature in zip(tasks, signatures, strict=True)
        ]
        self._reading = (time.perf_counter() - start) / sum(len(task.eval) for task in tasks)

    def add(self, values: Sequence[Values]) -> None:
        """Add the next row of each mode's matrix.

        Args:
            values: what the newest state scored on the examples of every task.
        """
        self._states.append(values)
        for mode, scores in (("oracle", self._oracle), ("routed", self._routed)):
            if mode in self.matrices:
                self.matrices[mode] = self.matrices[mode].with_row(self._row(scores))

    def _row(self, scores: Callable[[], list[Values]]) -> list[float | None]:
        learnt = len(self._states) - 1
        # Nothing is learnt in row 0, and every mode has the untouched model there.
        found = scores() if learnt else self._states[0]
        return [_mean(each) for each in found] + [None] * (len(self._names) - len(found))

    def _oracle(self) -> list[Values]:
        return [after[place] for place, after in enumerate(self._states[1:])]

    def _routed(self) -> list[Values]:
        learnt = len(self._states) - 1
        start = time.perf_counter()
        router = Router(dict(zip(self._names[:learnt], self._signatures[:learnt], strict=True)))
        sent = [router.nearest(requests) for requests in self._requests[:learnt]]
        count = sum(len(names) for names in sent)
        deciding = (time.perf_counter() - start) / count
        own = sum(names.count(name) for name, names in zip(self._names, sent, strict=False))
        self._routing = {
            "routed/accuracy": own / count,
            "routed/none_near": sum(names.count(None) for names in sent) / count,
            "routed/signature_bytes": float(sum(signature.bytes for signature in self._signatures[:learnt])),
            "routed/seconds_per_request": self._reading + deciding,
        }
        return [self._values(place, names) for place, names in enumerate(sent)]

    def _values(self, place: int, names: Sequence[str | None]) -> Values:
        """What each example of a task scores on the state it is sent to; the newest one where none is near."""
        states = [self._states[-1] if name is None else self._states[self._names.index(name) + 1] for name in names]
        return [state[place][number] for number, state in enumerate(states)]

    def metrics(self) -> dict[str, float]:
        """The continual-learning metrics of each mode, with the mode before their names, and those of `ROUTING`."""
        found = {
            f"{mode}/{name}": value
            for mode, matrix in self.matrices.items()
            for name, value in matrix.metrics().items()
        }
        return found | self._routing


def _mean(values: Values) -> float:
    return sum(values) / len(values)


def prove(states: States, entries: Sequence[tuple[Entry, Values]], measure: Callable[[Entry], Values]) -> None:
    """Check every entry out, and measure it on its task again: that is what the oracle's scores stand on.

    Args:
        states: the states of the entries, by reference.
        entries: each entry, and what its state scored on its task's examples when it had been learnt.
        measure: what the model scores on the examples of an entry's task.

    Raises:
        FailedError: a state is not the one that was recorded, or scores otherwise.
    """
    for entry, expected in entries:
        states.visit(entry.reference)
        if (found := state_digest(states.model)) != entry.state_digest:
            raise FailedError(
                f"{entry.reference} cannot be checked out: the weights' digest is {found[:12]}, recorded is "
                f"{entry.state_digest[:12]}; use another NEFT_HOME and report this as a bug"
            )
        again = measure(entry)
        if list(again) != list(expected):
            raise FailedError(
                f"{entry.reference}, checked out, scores {_mean(again):.4f} on its task, where it had scored "
                f"{_mean(expected):.4f} when it was learnt, though its weights are the same; run the stream on "
                "one machine, or leave `oracle` out of evaluation.modes"
            )
