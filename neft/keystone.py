"""Keystones: the few neurons that fire for every capability of a model; how they are found, ranked and silenced.

Keystone neurons, arXiv 2605.24846: generate from a few prompts of each capability, keep each site's strongest neurons
for each, and intersect. Here a neuron is one of the neuron space, with gate, up and down together by default; the paper
takes the rows and columns of each matrix by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from neft.encoding import IGNORED, Batch, Encoded, collate, encode_prompt
from neft.errors import FailedError, InputError
from neft.evaluation import generate_ids
from neft.modes import hooked, in_evaluation
from neft.neurons import NeuronSet, NeuronSpace, Site
from neft.strategies import check_count, check_fraction, check_path
from neft.tasks import Example

#: The prompts that neft comes with.
DEFAULT_PROMPTS = Path(__file__).with_name("keystone_prompts.yaml")

#: Site name -> float64 (site size,), on the CPU.
PerNeuron = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Keystones:
    """What was found: mean |activation| per neuron for each capability, and all that follows from it.

    Args:
        activity: capability -> mean |activation| of every neuron of the space over that capability's generated tokens.
        rho: share of each site's neurons that count as its strongest; at least one of each site.
    """

    space: NeuronSpace
    activity: Mapping[str, PerNeuron]
    rho: float

    @cached_property
    def by_capability(self) -> Mapping[str, NeuronSet]:
        """Capability -> the top rho of every site; ties go to the lower index."""
        return {capability: self._strongest(values) for capability, values in self.activity.items()}

    def _strongest(self, values: PerNeuron) -> NeuronSet:
        chosen = {}
        for site in self.space.sites:
            order = torch.argsort(values[site.name], descending=True, stable=True)
            chosen[site.name] = order[: max(1, round(self.rho * site.size))]
        return NeuronSet(self.space, chosen)

    @cached_property
    def neurons(self) -> NeuronSet:
        """The keystones: neurons in the top rho of every capability."""
        return reduce(NeuronSet.__and__, self.by_capability.values())

    @cached_property
    def strength(self) -> PerNeuron:
        """Cross-task strength: mean over capabilities of a neuron's activity, as a multiple of its site's mean.

        As a multiple, since activations grow with depth and the last layers would take every rank.
        """
        means: dict[str, torch.Tensor] = {}
        for site in self.space.sites:
            rows = torch.stack([values[site.name] for values in self.activity.values()])
            floor = torch.finfo(rows.dtype).tiny
            means[site.name] = (rows / rows.mean(1, keepdim=True).clamp_min(floor)).mean(0)
        return means

    @cached_property
    def ranking(self) -> tuple[tuple[str, int], ...]:
        """The keystones as (site, index), the strongest first; ties keep the order of the space."""
        return tuple(sorted(self.neurons, key=lambda neuron: -float(self.strength[neuron[0]][neuron[1]])))

    def top(self, count: int) -> NeuronSet:
        """The `count` strongest keystones.

        Raises:
            InputError: there are not that many.
        """
        if not 0 <= count <= len(self.ranking):
            raise InputError(f"the {count} strongest keystones are asked for, but there are {len(self.ranking)}")
        chosen: dict[str, list[int]] = {}
        for site, index in self.ranking[:count]:
            chosen.setdefault(site, []).append(index)
        return NeuronSet(self.space, chosen)

    def overlaps(self) -> dict[tuple[str, str], float]:
        """Each pair of capabilities -> intersection over union of their strongest neurons, in [0, 1]."""
        sets = self.by_capability
        return {(first, second): sets[first].iou(sets[second]) for first, second in combinations(sets, 2)}

    def capabilities_of(self, site: str) -> torch.Tensor:
        """Of each neuron of a site, for how many capabilities it is among the strongest; int64 (site size,)."""
        counts = torch.zeros(self.space.site(site).size, dtype=torch.int64)
        for neurons in self.by_capability.values():
            counts[torch.from_numpy(neurons[site].copy())] += 1
        return counts


@dataclass(frozen=True)
class KeystoneSearch:
    """How keystones are looked for; the options that the scorer and the protection policy share.

    Args:
        prompts: YAML file, capability -> prompts.
        rho: share of each site's neurons that count as its strongest for a capability.
        new_tokens: tokens generated after each prompt, at most; generation also ends at the end token.
    """

    prompts: Path = DEFAULT_PROMPTS
    rho: float = 0.01
    new_tokens: int = 32

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: an option is out of range, or the prompts cannot be used.
        """
        check_path("keystone", prompts=self.prompts)
        check_fraction("keystone", rho=self.rho)
        check_count("keystone", new_tokens=self.new_tokens)
        # Read now, so that a mistake in the file is found together with those of the config.
        _ = self.capabilities

    @cached_property
    def capabilities(self) -> Mapping[str, tuple[str, ...]]:
        """Capability -> its prompts, as the file has them."""
        return read_prompts(self.prompts)

    def find(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, space: NeuronSpace) -> Keystones:
        """Generate greedily from every prompt and see how strongly each neuron fires on what is written.

        The model is left as it was, bit for bit, and nothing is drawn at random.

        Raises:
            InputError: the model does not generate text, or prompt and answer outgrow its positions.
            FailedError: an activation is not finite.
        """
        can_generate = getattr(model, "can_generate", None)
        if can_generate is None or not can_generate():
            raise InputError(
                f"keystones are found on text that the model writes, and {type(model).__name__} does not generate; "
                "use another scorer and protection policy, or a causal or encoder-decoder language model"
            )
        activity = {
            capability: _activity(model, space, self._answered(model, tokenizer, capability))
            for capability in self.capabilities
        }
        return Keystones(space, activity, self.rho)

    def _answered(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, capability: str) -> Batch:
        """A batch of a capability's prompts and the model's answers; the answers, end token included, are labelled."""
        prompts = [
            encode_prompt(tokenizer, Example(prompt=text, completion="")) for text in self.capabilities[capability]
        ]
        self._check_length(model, capability, max(map(len, prompts)))
        with in_evaluation(model), torch.inference_mode():
            written = generate_ids(model, tokenizer, prompts, self.new_tokens).tolist()
        answers = [_until(ids, tokenizer.eos_token_id) for ids in written]
        pad = int(tokenizer.pad_token_id)
        if not getattr(model.config, "is_encoder_decoder", False):
            pairs = zip(prompts, answers, strict=True)
            return collate([Encoded((*prompt, *answer), len(prompt)) for prompt, answer in pairs], pad)
        # The encoder reads the prompts, the decoder its own answers.
        read = collate([Encoded(tuple(prompt), len(prompt)) for prompt in prompts], pad)
        return read | {"labels": collate([Encoded(tuple(answer), 0) for answer in answers], pad)["labels"]}

    def _check_length(self, model: nn.Module, capability: str, longest: int) -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and longest + self.new_tokens > positions:
            raise InputError(
                f"the longest prompt of {capability!r} in {self.prompts} has {longest} tokens, and new_tokens "
                f"{self.new_tokens} more do not fit in the model's {positions} positions; shorten one of the two"
            )


def _until(ids: list[int], end: int | None) -> list[int]:
    """The ids up to the end token, included; what follows it is padding."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def _activity(model: nn.Module, space: NeuronSpace, batch: Batch) -> PerNeuron:
    """Mean |activation| of each neuron over the labelled tokens.

    The encoder of an encoder-decoder model sees no generated token: there the prompts' own tokens count.
    """
    # Imported late: the package of scorers imports this module.
    from neft.scoring.taps import run_tapped

    found: dict[str, torch.Tensor] = {}
    answered = batch["labels"] != IGNORED
    two_texts = getattr(model.config, "is_encoder_decoder", False)

    def collect(site: Site, activation: torch.Tensor, gradient: torch.Tensor | None, mask: torch.Tensor) -> None:
        counted = mask if two_texts else mask & answered.to(mask.device)
        strength = activation.float().abs().mean(-1) * counted[..., None]
        found[site.name] = strength.sum((0, 1)).cpu().double() / int(counted.sum())

    run_tapped(model, space, [batch], collect, backward=False)
    for name, values in found.items():
        if not torch.isfinite(values).all():
            raise FailedError(
                f"activations of site {name!r} are not finite on the keystone prompts: look for broken rows in the "
                "model, or use a wider model.dtype"
            )
    return found


def read_prompts(path: Path) -> Mapping[str, tuple[str, ...]]:
    """Read a file of prompts: capability -> a prompt, or a list of them.

    Raises:
        InputError: no such file, not YAML, fewer than two capabilities, or a prompt that is no text.
    """
    if not path.is_file():
        raise InputError(f"option 'prompts' of 'keystone': no such file: {path}; give a YAML file of prompts")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"option 'prompts' of 'keystone': {path} is not YAML: {reason}") from error
    if not isinstance(raw, dict) or len(raw) < 2:
        raise InputError(
            f"option 'prompts' of 'keystone': {path} must map at least two capabilities to their prompts, since "
            'keystones are what they share; write lines such as `maths: ["2 + 2 ="]`'
        )
    return {_capability(path, name): _prompts(path, name, given) for name, given in raw.items()}


def _capability(path: Path, name: object) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"option 'prompts' of 'keystone': {path} names a capability {name!r}, which is no text; put it in quotes"
        )
    return name


def _prompts(path: Path, capability: str, given: object) -> tuple[str, ...]:
    prompts = [given] if isinstance(given, str) else given
    if not isinstance(prompts, list) or not prompts:
        raise InputError(
            f"option 'prompts' of 'keystone': {capability!r} in {path} is {given!r}; give it a list of prompts"
        )
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(
                f"option 'prompts' of 'keystone': a prompt of {capability!r} in {path} is {prompt!r}; write some text, "
                "in quotes"
            )
    return tuple(prompts)


@contextmanager
def silenced(model: nn.Module, neurons: NeuronSet) -> Iterator[None]:
    """Inside, the activations of `neurons` are zero; weights are never touched, and outside all is as before."""
    with ExitStack() as stack:
        for name, indices in neurons.indices.items():
            stack.enter_context(_muted(model, neurons.space.site(name), indices))
        yield


@contextmanager
def _muted(model: nn.Module, site: Site, indices: np.ndarray) -> Iterator[None]:
    positions = torch.from_numpy(site.tap.positions(indices).ravel())
    with hooked(model, site.tap, lambda tensor: tensor.index_fill(-1, positions.to(tensor.device), 0)):
        yield
