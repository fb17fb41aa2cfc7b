"""Selection: from scores and a budget to a neuron set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from neft.errors import FailedError, InputError
from neft.neurons import NeuronSet, NeuronSpace, Site
from neft.scoring.scores import Scores

LEAST_FRACTION, LARGEST_FRACTION = 0.01, 0.5

#: What is done where a site has fewer free neurons than its share of the budget.
WhenFull = Literal["error", "share", "spill"]


@dataclass(frozen=True)
class Lent:
    """Neurons of earlier tasks that may be shared, and their importance to those: site name -> (site size,)."""

    neurons: NeuronSet
    importance: Mapping[str, torch.Tensor]


class Budget(BaseModel):
    """How much a task may train: neurons or model parameters, as a fraction or a count.

    In a config a bare fraction (`0.1`) or count (`4608`) means neurons; `{parameters: 0.09}` means model parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    neurons: int | float | None = Field(None, description="count, or fraction (0.01 to 0.5) of the space's neurons")
    parameters: int | float | None = Field(
        None, description="count, or fraction (0.01 to 0.5) of the model's parameters"
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_number(cls, value: Any) -> Any:
        amounts = list(value.values()) if isinstance(value, Mapping) else [value]
        if any(isinstance(amount, bool) for amount in amounts):
            raise ValueError(f"{value!r} is no budget; give a fraction such as 0.1, or a count")
        return {"neurons": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _one_in_range(self) -> Self:
        if (self.neurons is None) == (self.parameters is None):
            raise ValueError("give either `neurons` or `parameters`")
        amount = self.amount
        if isinstance(amount, float) and not LEAST_FRACTION <= amount <= LARGEST_FRACTION:
            raise ValueError(f"fraction {amount} is outside {LEAST_FRACTION} to {LARGEST_FRACTION}")
        if isinstance(amount, int) and amount < 1:
            raise ValueError(f"count {amount} must be at least 1")
        return self

    @property
    def amount(self) -> int | float:
        amount = self.neurons if self.neurons is not None else self.parameters
        assert amount is not None
        return amount

    def cost(self, site: Site) -> int:
        """What one neuron of `site` takes from the budget."""
        return 1 if self.neurons is not None else site.neuron_parameters

    def total(self, space: NeuronSpace) -> int:
        """The budget in neurons, or in parameters."""
        if isinstance(self.amount, int):
            return self.amount
        whole = len(space) if self.neurons is not None else space.model_parameters
        return max(1, round(self.amount * whole))


class SelectionSpec(BaseModel):
    """How a budget is spent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["top_k", "threshold"] = Field(
        "top_k", description="`top_k`: the best that the budget pays for; `threshold`: those of them at or above it"
    )
    scope: Literal["per_site", "global"] = Field(
        "per_site", description="`per_site`: every layer gets its share of the budget; `global`: one ranking for all"
    )
    threshold: float | None = Field(None, description="least score to be chosen, for `rule: threshold`")
    lowest_layer: int | float = Field(
        0,
        description="lowest layer to choose from: its number, or how far up it stands (`0.5`: the upper half); the "
        "budget stays what it is of the whole model, so 0.1 takes a fifth of the upper half's neurons",
    )

    @field_validator("lowest_layer", mode="before")
    @classmethod
    def _number_or_fraction(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not number and not (isinstance(value, float) and 0 <= value < 1):
            raise ValueError("give a layer's number, from 0 up, or a fraction below 1 such as 0.5")
        return value

    @model_validator(mode="after")
    def _threshold_given(self) -> Self:
        if (self.rule == "threshold") != (self.threshold is not None):
            raise ValueError("`threshold` goes with `rule: threshold`, and only with it")
        return self

    def sites(self, space: NeuronSpace) -> tuple[Site, ...]:
        """The sites of `space` that may be chosen from: those from `lowest_layer` up, counted in each stack by itself.

        Raises:
            InputError: the model has no such layer.
        """
        depths: dict[str, int] = {}
        for site in space.sites:
            depths[site.stack] = max(depths.get(site.stack, 0), site.layer + 1)

        def height(site: Site) -> float:
            # Quotients are compared, not products: 3 / 30 is 0.1, but 0.1 * 30 is more than 3.
            return site.layer if isinstance(self.lowest_layer, int) else site.layer / depths[site.stack]

        allowed = tuple(site for site in space.sites if height(site) >= self.lowest_layer)
        if not allowed:
            raise InputError(
                f"method.selection.lowest_layer {self.lowest_layer} leaves no layer to choose from; the highest layer "
                f"with neurons is {max(depths.values()) - 1}"
            )
        return allowed


@dataclass(frozen=True)
class Selection:
    """The chosen neurons, how many were free, and what is worth saying (ties at the cut, a budget not spent).

    `capacity` is the ledger: site name -> neurons free before and after the choice.
    """

    neurons: NeuronSet
    free: int
    notes: tuple[str, ...]
    capacity: Mapping[str, tuple[int, int]]


def select(
    scores: Scores,
    budget: Budget,
    spec: SelectionSpec | None = None,
    free: NeuronSet | None = None,
    when_full: WhenFull = "error",
    lent: Lent | None = None,
) -> Selection:
    """Choose the highest-scored free neurons that the budget pays for.

    A neuron below the spec's `lowest_layer` is not free, whoever owns it. Ties go to the earlier site and the lower
    index, so that the same scores always give the same set.

    Args:
        when_full: what is done where a site has too few free neurons: `error`; `share`, which adds as many of those
            `lent` as are needed, the least important first; `spill`, which spends the rest on the highest-scored free
            neurons of other sites.

    Raises:
        FailedError: too few neurons are free, or none is chosen; says how many are free and what can be done.
        InputError: the budget is larger than the space, `free` belongs to another neuron space, or the model has no
            layer as high as `lowest_layer`.
    """
    spec, space = spec or SelectionSpec(), scores.space
    free = space.all() if free is None else free
    free.check_space(space)
    allowed = spec.sites(space)
    free = NeuronSet(space, {site.name: free[site.name] for site in allowed})
    total = budget.total(space)
    _check_size(budget, total, allowed, space)
    if spec.scope == "global":
        groups = [(list(allowed), total)]
    else:
        groups = [([site], share) for site, share in _shares(allowed, total, budget)]
    notes: list[str] = []
    open_ = free
    if when_full == "share" and lent is not None:
        open_ = _with_lent(groups, free, lent, budget, notes)
    elif when_full == "spill":
        groups = _spilled(groups, free, scores, budget, notes)
    chosen: dict[str, NDArray[np.int64]] = {}
    for sites, limit in groups:
        picked, group_notes = _best(scores, sites, limit, budget, spec, open_)
        notes += group_notes
        for site in sites:
            chosen[site.name] = picked[site.name]
    neurons = NeuronSet(space, chosen)
    if not neurons:
        raise FailedError(_nothing_chosen(scores, spec, free))
    left = free - neurons
    capacity = {site.name: (len(free[site.name]), len(left[site.name])) for site in allowed}
    return Selection(neurons, len(free), tuple(notes), capacity)


def _with_lent(
    groups: Sequence[tuple[list[Site], int]], free: NeuronSet, lent: Lent, budget: Budget, notes: list[str]
) -> NeuronSet:
    """The free neurons, and as many of the lent ones as each group lacks, the least important first."""
    added: dict[str, list[int]] = {}
    for sites, limit in groups:
        missing = limit - sum(len(free[site.name]) * budget.cost(site) for site in sites)
        if missing <= 0:
            continue
        offered = [
            (float(lent.importance[site.name][index]), place, int(index), budget.cost(site))
            for place, site in enumerate(sites)
            for index in lent.neurons[site.name]
        ]
        count = 0
        for _, place, index, cost in sorted(offered):
            if missing <= 0:
                break
            added.setdefault(sites[place].name, []).append(index)
            missing, count = missing - cost, count + 1
        where = sites[0].name if len(sites) == 1 else "the model"
        notes.append(f"{where} is full: {count} neurons that matter least to earlier tasks are shared")
    return free | NeuronSet(free.space, added)


def _spilled(
    groups: Sequence[tuple[list[Site], int]], free: NeuronSet, scores: Scores, budget: Budget, notes: list[str]
) -> list[tuple[list[Site], int]]:
    """The groups with what a full site cannot spend given to sites that have neurons left, the highest-scored first."""
    rooms = [sum(len(free[site.name]) * budget.cost(site) for site in sites) for sites, _ in groups]
    limits = [min(limit, room) for (_, limit), room in zip(groups, rooms, strict=True)]
    over = sum(limit for _, limit in groups) - sum(limits)
    if not over or sum(rooms) < sum(limit for _, limit in groups):
        return list(groups)
    waiting = []
    for place, (sites, _) in enumerate(groups):
        for site in sites:
            values = scores.values[site.name][torch.from_numpy(free[site.name].copy())].sort(descending=True).values
            spare = values[limits[place] // budget.cost(site) :].tolist()
            waiting += [(-value, place, budget.cost(site)) for value in spare]
    moved = over
    for _, place, cost in sorted(waiting):
        if over <= 0:
            break
        limits[place], over = limits[place] + cost, over - cost
    full = sum(limit < asked for limit, (_, asked) in zip(limits, groups, strict=True))
    unit = "neurons" if budget.neurons is not None else "parameters"
    notes.append(f"{full} full sites spill {moved} {unit} of their share to others")
    return [(sites, limit) for (sites, _), limit in zip(groups, limits, strict=True)]


def _shares(sites: Sequence[Site], total: int, budget: Budget) -> list[tuple[Site, int]]:
    """Each site's share of the budget, in proportion to what its neurons cost, by largest remainder."""
    weights = [site.size * budget.cost(site) for site in sites]
    # Whole numbers: 9 x 1/15 and 9 x 6/15 leave the same remainder, but not as floats.
    parts = [divmod(total * weight, sum(weights)) for weight in weights]
    shares = [share for share, _ in parts]
    by_remainder = sorted(range(len(sites)), key=lambda place: -parts[place][1])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return list(zip(sites, shares, strict=True))


def _best(
    scores: Scores, sites: list[Site], limit: int, budget: Budget, spec: SelectionSpec, free: NeuronSet
) -> tuple[dict[str, NDArray[np.int64]], list[str]]:
    """The best free neurons of `sites` whose costs add up to at most `limit`."""
    where = sites[0].name if len(sites) == 1 else "the model"
    owner = np.concatenate([np.full(len(free[site.name]), place) for place, site in enumerate(sites)])
    index = np.concatenate([free[site.name] for site in sites])
    value = torch.cat([scores.values[site.name][torch.from_numpy(free[site.name].copy())] for site in sites]).numpy()
    cost = np.array([budget.cost(site) for site in sites], dtype=np.int64)[owner]
    affordable = min(int(cost.sum()), limit)
    whole = sum(site.size * budget.cost(site) for site in sites)
    if cost.sum() < limit:
        raise FailedError(_too_few(where, len(index), limit, whole, budget, spec))
    order = np.argsort(-value, kind="stable")
    taken = order[np.cumsum(cost[order]) <= affordable]
    notes = []
    left = order[len(taken) :]
    if len(taken) and len(left) and value[left[0]] == value[taken[-1]]:
        tied = int((value[left] == value[taken[-1]]).sum())
        notes.append(
            f"{where}: {tied} neurons tie with the last chosen one (score {value[taken[-1]]:.3g}); lower index wins"
        )
    if spec.threshold is not None:
        above = taken[value[taken] >= spec.threshold]
        if len(above) < len(taken):
            notes.append(
                f"{where}: {len(above)} of {len(taken)} neurons in budget reach the threshold {spec.threshold:g}"
            )
        taken = above
    return {site.name: np.sort(index[taken[owner[taken] == place]]) for place, site in enumerate(sites)}, notes


def _check_size(budget: Budget, asked: int, allowed: Sequence[Site], space: NeuronSpace) -> None:
    whole = sum(site.size * budget.cost(site) for site in allowed)
    if asked > whole:
        unit = "neurons" if budget.neurons is not None else "parameters in neurons"
        restricted = len(allowed) < len(space.sites)
        where = " in the layers from method.selection.lowest_layer up" if restricted else ""
        remedy = "lower method.selection.lowest_layer" if restricted else "add kinds under method.kinds"
        raise InputError(
            f"method.budget {budget.amount} asks for {asked} {unit}, but the model has {whole} of the chosen kinds"
            f"{where}; lower it, or {remedy}"
        )


def _too_few(where: str, free: int, limit: int, whole: int, budget: Budget, spec: SelectionSpec) -> str:
    unit = "neurons" if budget.neurons is not None else "parameters' worth of neurons"
    lower = f"lower method.selection.lowest_layer (now {spec.lowest_layer}), " if spec.lowest_layer else ""
    return (
        f"method.budget asks for {limit} {unit} in {where}, where {free} neurons are free (of {whole} {unit} in all; "
        f"method.protection keeps the rest): lower method.budget, {lower}set method.selection.scope to global, add "
        "kinds of neurons under method.kinds, or take a policy that leaves more free, such as method.protection: none"
    )


def _nothing_chosen(scores: Scores, spec: SelectionSpec, free: NeuronSet) -> str:
    best = max(
        float(scores.values[name][torch.from_numpy(indices.copy())].max()) for name, indices in free.indices.items()
    )
    if spec.threshold is None or best >= spec.threshold:
        return "method.budget is too small to pay for a single neuron; raise it"
    return (
        f"no neuron reaches method.selection.threshold {spec.threshold:g}: the best free one scores {best:.3g}; "
        "lower the threshold, or use rule: top_k"
    )
