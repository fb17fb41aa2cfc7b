"""Rehearsal: which examples of a task are kept, and how those of earlier tasks are mixed among a new one's."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import chain, cycle, islice, zip_longest
from typing import Any, TypeVar

from neft.tasks import Example

_T = TypeVar("_T")


def drawn(examples: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    """At most `count` examples, drawn by the seed; as many of each completion as there are, in turn.

    Every beginning of them is balanced too. Where each example has a completion of its own, it is a plain sample.
    """
    shuffled = random.Random(seed).sample(examples, len(examples))
    by_completion: dict[str, list[Example]] = {}
    for example in shuffled:
        by_completion.setdefault(example.completion, []).append(example)
    return tuple(_in_turn(list(by_completion.values()))[:count])


def mixed(buffers: Sequence[Sequence[Example]], count: int, share: float) -> tuple[Example, ...]:
    """What of the buffers, one an earlier task, makes up `share` of all examples beside `count` new ones.

    The buffers come in turn, each from its beginning, and again from there when all are used up.
    """
    wanted = round(count * share / (1 - share))
    return tuple(islice(cycle(_in_turn(buffers)), wanted))


def _in_turn(groups: Sequence[Sequence[_T]]) -> list[_T]:
    """The first of each group, then the second of each that has one, and so on."""
    return [each for each in chain.from_iterable(zip_longest(*groups)) if each is not None]


def described(examples: Sequence[Example]) -> dict[str, Any]:
    """Examples as JSON."""
    return {"examples": [[example.prompt, example.completion] for example in examples]}


def read(description: Mapping[str, Any]) -> tuple[Example, ...]:
    """The examples that `described` has written."""
    return tuple(
        Example(prompt if isinstance(prompt, str) else tuple(prompt), completion)
        for prompt, completion in description["examples"]
    )
