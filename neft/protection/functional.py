"""The `functional` policy: a new task must not move what earlier tasks compute, as a small summary of each tells."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch, batches
from neft.guard import Guard, Limit
from neft.memory import Memory
from neft.modes import in_evaluation
from neft.neurons import NeuronSet, NeuronSpace
from neft.protection.exclude import Exclude
from neft.protection.policy import Learnt
from neft.scoring.taylor import Taylor
from neft.strategies import check_count, check_fraction
from neft.subspaces import Directions, gather, leading, united
from neft.tasks import Task

_BATCH = 8


@dataclass(frozen=True)
class Functional(Exclude):
    """Exclusion, and changes of chosen rows kept out of the directions in which earlier tasks' inputs lie.

    Of each learnt task a summary is kept: the leading directions of what every chosen row reads (its uncentred second
    moments, over `examples` training examples), as many as carry `energy` of it and as fit in `memory` of the overlay's
    bytes. A new task's rows change only across them: gradients are projected (GPM, arXiv 2103.09762), and so is every
    optimiser step, since an adaptive step leaves the space again. Of any input's directions at most `closed` are
    closed, the ones with most energy, so that there is always room to learn.

    What the untouched model does is protected like a first task: `general` texts that it writes itself, drawn by the
    stream's seed, stand for it. With 0 it is not protected.
    """

    energy: float = 0.9
    closed: float = 0.45
    memory: float = 0.2
    examples: int = 48
    general: int = 16
    general_tokens: int = 128

    name: ClassVar[str] = "functional"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, energy=self.energy, closed=self.closed, memory=self.memory)
        check_count(self.name, examples=self.examples, general_tokens=self.general_tokens)
        if self.general:
            check_count(self.name, general=self.general)

    def before(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace, seed: int
    ) -> Learnt | None:
        if not self.general:
            return None
        read = written_by(model, tokenizer, self.general, self.general_tokens, seed)
        memory = self._summary(model, space, read, None)
        scores = Taylor().score(model, tokenizer, space, read, seed)
        return Learnt("(the base model)", space.none(), scores, memory)

    def guard(self, model: nn.Module, neurons: NeuronSet, earlier: Sequence[Learnt]) -> Guard | None:
        memories = [learnt.memory for learnt in earlier if learnt.memory and learnt.memory.policy == self.name]
        return AcrossInputs(self._closed_directions(neurons, memories)) if memories else None

    def _closed_directions(self, neurons: NeuronSet, memories: Sequence[Memory]) -> dict[str, torch.Tensor]:
        """Module name -> basis (r, in) of the directions that changes of its rows must not have."""
        found: dict[str, torch.Tensor] = {}
        bases: dict[tuple[str, ...], torch.Tensor] = {}
        for module, rows in neurons.rows().items():
            if rows.side != "row":
                continue
            known = [memory for memory in memories if module in memory.description["groups"]]
            groups = tuple(memory.description["groups"][module] for memory in known)
            if known and groups not in bases:
                parts = [_read(memory, group) for memory, group in zip(known, groups, strict=True)]
                most = int(self.closed * parts[0].basis.shape[1])
                bases[groups] = united(parts, self.energy, most).basis.float()
            if known:
                found[module] = bases[groups]
        return found

    def remember(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        neurons: NeuronSet,
        task: Task,
        max_length: int,
        seed: int,
    ) -> Memory | None:
        sample = random.Random(seed).sample(task.train, min(self.examples, len(task.train)))
        read = list(batches(tokenizer, sample, _BATCH, max_length))
        dtype = next(model.parameters()).dtype
        overlay = neurons.parameters * dtype.itemsize
        # Later tasks choose other neurons: the modules of the whole space are summarised.
        return self._summary(model, neurons.space, read, int(self.memory * overlay))

    def _summary(
        self, model: nn.Module, space: NeuronSpace, read: Sequence[Batch], bytes_allowed: int | None
    ) -> Memory:
        parts = [part for site in space.sites for part in site.parts]
        rows = dict.fromkeys(part.module for part in parts if part.side == "row")
        columns = dict.fromkeys(part.module for part in parts if part.side == "column")
        moments = gather(model, rows, columns, read)
        tensors = {f"{name}/channels": values.half() for name, values in moments.energy.items()}
        room = _room(moments.second, tensors, bytes_allowed)
        shares = []
        for name, second in moments.second.items():
            found = leading(second, self.energy, room(second.shape[0]))
            shares.append(found.share)
            tensors |= {f"{name}/basis": found.basis.half(), f"{name}/energy": found.energy.float()}
        description = {
            "groups": dict(moments.groups),
            "totals": {name: float(second.trace()) for name, second in moments.second.items()},
            "least_share": min(shares, default=1.0),
        }
        return Memory(self.name, tensors, description)


class AcrossInputs(Guard):
    """Keeps changes of rows (k, in) across given directions (r, in) of their modules' inputs."""

    def __init__(self, closed: Mapping[str, torch.Tensor]):
        self.closed = closed

    def limits(self) -> Mapping[str, Limit]:
        return {name: partial(_across, basis) for name, basis in self.closed.items()}


def _across(basis: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    basis = basis.to(change.device)
    values = change.float()
    return (values - (values @ basis.T) @ basis).to(change.dtype)


def _read(memory: Memory, group: str) -> Directions:
    """What a memory keeps of a group's inputs, in the precision of computing."""
    basis, energy = memory.tensors[f"{group}/basis"].float(), memory.tensors[f"{group}/energy"]
    return Directions(basis, energy, memory.description["totals"][group])


def _room(
    second: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor], bytes_allowed: int | None
) -> Callable[[int], int]:
    """How many directions of an input of some width fit, where bytes are spread by the square of the width."""
    if bytes_allowed is None:
        return lambda width: width
    left = bytes_allowed - sum(values.nbytes for values in others.values())
    squares = sum(values.shape[0] ** 2 for values in second.values())
    # A direction costs its halves, and a float for its energy.
    return lambda width: max(1, int(left * width**2 / squares / (2 * width + 4)))


@torch.no_grad()
def written_by(model: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, seed: int) -> list[Batch]:
    """Batches of `count` texts of `tokens` tokens that the model writes by itself, drawn by the seed."""
    transformer: Any = model
    first = next(
        token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None
    )
    start = torch.full((count, 1), int(first), device=next(model.parameters()).device)
    with in_evaluation(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        ids: torch.Tensor = transformer.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,
            max_new_tokens=tokens - 1,
            min_new_tokens=tokens - 1,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part.clone()}
        for part in ids.cpu().split(_BATCH)
    ]
