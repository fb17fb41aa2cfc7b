"""The `functional` policy: a new task must not move what earlier tasks compute, as a small summary of each tells."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import Batch, batches
from neft.guard import Guard, Limit
from neft.memory import Memory
from neft.modes import in_evaluation
from neft.neurons import NeuronSet, NeuronSpace, Side
from neft.protection.exclude import Exclude
from neft.protection.policy import Learnt
from neft.scoring.taylor import Taylor
from neft.strategies import check_count, check_fraction
from neft.subspaces import Directions, gather, leading
from neft.tasks import Task

_BATCH = 8


@dataclass(frozen=True)
class Functional(Exclude):
    """Exclusion, and changes kept across the directions in which the inputs of earlier tasks lie.

    Of each learnt task a summary is kept: the leading directions of what the modules read at `tokens` tokens of
    `examples` training examples, as many as carry `energy` of it and as fit in `memory` of the overlay's bytes, and how
    strongly each neuron fires. What a new task changes in a module must be across the leading directions that carry
    `energy` of what was kept: of a row's change, the whole input's directions; of the chosen columns together, the
    directions in which those neurons fire. A column whose neuron fires outside of them moves the less the louder it
    does. Gradients are projected (GPM, arXiv 2103.09762), and so is every optimiser step, since an adaptive step leaves
    the space again. Of any input's directions at most `closed` are closed, so that there is always room to learn.

    What the untouched model does is protected like a first task: `general` texts that it writes itself, drawn by the
    stream's seed, stand for it. With 0 it is not protected.
    """

    energy: float = 0.9
    closed: float = 0.45
    memory: float = 0.2
    examples: int = 48
    tokens: int = 512
    general: int = 16
    general_tokens: int = 128

    name: ClassVar[str] = "functional"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.name, energy=self.energy, closed=self.closed, memory=self.memory)
        check_count(self.name, examples=self.examples, tokens=self.tokens, general_tokens=self.general_tokens)
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

    def _closed_directions(self, neurons: NeuronSet, memories: Sequence[Memory]) -> dict[str, Closed]:
        """Module name -> the directions that changes of its rows or columns must not have."""
        found: dict[str, Closed] = {}
        shared: dict[tuple[str, ...], torch.Tensor] = {}
        for module, chosen in neurons.rows().items():
            known = [memory for memory in memories if module in memory.description["groups"]]
            groups = tuple(memory.description["groups"][module] for memory in known)
            if not known:
                continue
            parts = [_read(memory, group).rows for memory, group in zip(known, groups, strict=True)]
            if chosen.side == "column":
                index = torch.from_numpy(chosen.positions.copy())
                missed = [_unexplained(memory, group)[index] for memory, group in zip(known, groups, strict=True)]
                found[module] = Closed("column", self._leading([part[:, index] for part in parts]), _silence(missed))
                continue
            if groups not in shared:
                shared[groups] = self._leading(parts)
            found[module] = Closed("row", shared[groups])
        return found

    def _leading(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        rows = torch.cat(list(parts))
        return leading(rows, self.energy, int(self.closed * rows.shape[1])).basis.float()

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
        sides = {part.module: part.side for site in space.sites for part in site.parts}
        inputs = gather(model, sides, read, self.tokens)
        channels = {
            f"{name}/channels": inputs.rows[inputs.groups[name]].square().sum(0).half()
            for name, side in sides.items()
            if side == "column"
        }
        left = None if bytes_allowed is None else bytes_allowed - sum(values.nbytes for values in channels.values())
        tensors, totals, shares = dict(channels), {}, []
        for name, rows in inputs.rows.items():
            found = leading(rows, self.energy, _most(rows.shape[1], len(inputs.rows), left))
            totals[name] = found.total
            shares.append(found.share)
            tensors |= {f"{name}/basis": found.basis.half(), f"{name}/energy": found.energy.float()}
        return Memory(self.name, tensors, {"groups": dict(inputs.groups), "totals": totals, "least_share": min(shares)})


@dataclass(frozen=True)
class Closed:
    """Orthonormal directions (r, n): of a module's input, for its rows; among its chosen columns, for columns.

    `scale` (k,), in (0, 1], is how much of each row's or column's change is kept before that.
    """

    side: Side
    basis: torch.Tensor
    scale: torch.Tensor | None = None

    def limit(self, change: torch.Tensor) -> torch.Tensor:
        """The change (k, d) of rows or columns, without its part along the directions."""
        basis, values = self.basis.to(change.device), change.float()
        if self.scale is not None:
            values = values * self.scale.to(change.device)[:, None]
        along = (values @ basis.T) @ basis if self.side == "row" else basis.T @ (basis @ values)
        return (values - along).to(change.dtype)


class AcrossInputs(Guard):
    """Keeps changes across the closed directions of their modules' inputs."""

    def __init__(self, closed: Mapping[str, Closed]):
        self.closed = closed

    def limits(self) -> Mapping[str, Limit]:
        return {name: closed.limit for name, closed in self.closed.items()}


def _read(memory: Memory, group: str) -> Directions:
    """What a memory keeps of a group's inputs, in the precision of computing."""
    basis, energy = memory.tensors[f"{group}/basis"].float(), memory.tensors[f"{group}/energy"]
    return Directions(basis, energy, memory.description["totals"][group])


def _unexplained(memory: Memory, group: str) -> torch.Tensor:
    """Energy (in,) of each channel that the kept directions miss, over a channel's mean energy."""
    energy = memory.tensors[f"{group}/channels"].double()
    missed = energy / memory.description["totals"][group] - _read(memory, group).rows.square().sum(0)
    return missed.clamp_min(0) * len(energy)


def _silence(unexplained: Sequence[torch.Tensor]) -> torch.Tensor:
    """How silent each neuron is outside of the directions that earlier tasks keep: 1 where it never fires."""
    return (1 / (1 + torch.stack(list(unexplained)).amax(0))).float()


def _most(width: int, groups: int, bytes_left: int | None) -> int:
    """How many directions of an input of that width fit, where every group gets the same bytes."""
    # A direction costs its halves, and a float for its energy.
    return width if bytes_left is None else max(1, bytes_left // groups // (2 * width + 4))


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
