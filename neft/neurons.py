"""Neurons: the space of all neurons of a model, its sites, and frozen sets of neurons chosen from it.

A neuron is what moves together when a task learns: rows and columns of the weight matrices of one layer. Matrices are
spoken of in (out, in) orientation, whatever the module stores: a *row* computes one output, a *column* reads one
input. Biases are not part of a neuron; they stay frozen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from neft.architectures import Anatomy, Attention, FeedForward, anatomy_of
from neft.errors import InputError, nearest
from neft.files import PathLike, load_tensors, save_tensors, understood

Kind = Literal["ffn", "ffn_in", "ffn_out", "attention", "qk"]
Side = Literal["row", "column"]
Indices = NDArray[np.int64]

KINDS: tuple[Kind, ...] = get_args(Kind)
_FILE_KIND = "neft-neuron-set"
#: Bounds on the numbers of a neuron space that a file describes. Neurons own a row for each query head of a group.
_LARGEST, _MOST_REPEATS = 2**31, 256


@dataclass(frozen=True)
class Part:
    """One weight matrix's share of a site: which rows or columns of `module` belong to each neuron.

    Neuron n owns the positions `offset + (n // block) * stride + n % block + g * repeat_stride` for g < `repeats`.
    With the defaults that is position n; fused and grouped-query attention need the rest.
    `width` is the length of one row or column, in parameters.
    """

    module: str
    side: Side
    width: int
    offset: int = 0
    block: int = 1
    stride: int = 1
    repeats: int = 1
    repeat_stride: int = 0

    def positions(self, neurons: Indices) -> Indices:
        """Rows or columns of each neuron, int64, shape (len(neurons), repeats)."""
        first = self.offset + (neurons // self.block) * self.stride + neurons % self.block
        return first[:, None] + np.arange(self.repeats)[None, :] * self.repeat_stride


@dataclass(frozen=True)
class Site:
    """One layer's group of neurons of one kind."""

    name: str
    kind: Kind
    size: int
    parts: tuple[Part, ...]

    @property
    def stack(self) -> str:
        """Name of the list of layers that the site stands in (`model.layers`, `encoder.block`), empty without one."""
        return self._place[0]

    @property
    def layer(self) -> int:
        """The number of its layer in the stack, from 0 at the model's input; 0 where layers have no numbers."""
        return self._place[1]

    @property
    def _place(self) -> tuple[str, int]:
        """What is numbered first in a module's name is the layer; T5 numbers the parts of a layer too, after it."""
        names = self.name.split(".")
        place = next((place for place, name in enumerate(names) if name.isdecimal()), None)
        return ("", 0) if place is None else (".".join(names[:place]), int(names[place]))

    @property
    def neuron_parameters(self) -> int:
        """Model parameters that one neuron of this site owns."""
        return sum(part.width * part.repeats for part in self.parts)

    @property
    def tap(self) -> Part:
        """Where the neuron's activation is seen: the input its column reads, else the output its last row computes."""
        columns = [part for part in self.parts if part.side == "column"]
        return columns[0] if columns else self.parts[-1]


@dataclass(frozen=True)
class ModuleRows:
    """Rows (or columns) of one weight matrix: sorted int64 `positions` on the given `side`."""

    side: Side
    positions: Indices


@dataclass(frozen=True)
class NeuronSpace:
    """Every neuron of a model, of the chosen kinds, in the order of its modules."""

    sites: tuple[Site, ...]
    model_parameters: int

    @classmethod
    def from_model(
        cls, model: nn.Module, kinds: Iterable[Kind] = ("ffn",), anatomy: Anatomy | None = None
    ) -> NeuronSpace:
        """Find the neurons of `model` from its modules.

        Args:
            model: a transformers model, or a PEFT model around one.
            kinds: `ffn` (gate row, up row and down column move together; or fc1 row and fc2 column), `ffn_in` and
                `ffn_out` (an up row, a down column, independently: NeFT, arXiv 2403.11621), `attention` (a value row
                and its output columns), `qk` (a key row and the query rows that read it).
            anatomy: where the neurons are, for a family that `neft.architectures` does not know.

        Raises:
            InputError: unknown kind or family, kinds that share weights, or a model without the asked kind.
        """
        unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
        base = unwrap() if unwrap else model
        kinds = _checked_kinds(kinds)
        config = getattr(base, "config", None)
        anatomy = anatomy or anatomy_of(getattr(config, "model_type", type(base).__name__))
        modules = {
            name: getattr(module, "base_layer", module)
            for name, module in base.named_modules()
            if ".base_layer" not in name
        }
        sites = [site for kind in kinds for site in _sites_of_kind(kind, modules, anatomy, config)]
        order = {name: place for place, name in enumerate(modules)}
        sites.sort(key=lambda site: (order[site.parts[0].module], KINDS.index(site.kind)))
        return cls(tuple(sites), _unique_parameters(base))

    def __len__(self) -> int:
        return sum(site.size for site in self.sites)

    @property
    def parameters(self) -> int:
        """Model parameters that all neurons of the space own together."""
        return sum(site.size * site.neuron_parameters for site in self.sites)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the space's description: two spaces are the same when their fingerprints are."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            InputError: there is none.
        """
        if name not in self._by_name:
            raise InputError(f"no site {name!r} in this neuron space; {nearest(name, self._by_name)}")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def to_dict(self) -> dict[str, Any]:
        return {"sites": [asdict(site) for site in self.sites], "model_parameters": self.model_parameters}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> NeuronSpace:
        """The space that `to_dict` has described.

        Raises:
            InputError: two sites of one name, or numbers that no model has, such as a site without a neuron.
        """
        sites = tuple(
            Site(site["name"], site["kind"], site["size"], tuple(Part(**part) for part in site["parts"]))
            for site in description["sites"]
        )
        seen: set[str] = set()
        for site in sites:
            if site.name in seen or not _could_be(site):
                raise InputError(f"no model has a site as the neuron space describes {site.name!r}; take another file")
            seen.add(site.name)
        return cls(sites, description["model_parameters"])

    def none(self) -> NeuronSet:
        """The empty set."""
        return NeuronSet(self, {})

    def all(self) -> NeuronSet:
        """Every neuron of the space."""
        return NeuronSet(self, {site.name: np.arange(site.size) for site in self.sites})


@dataclass(frozen=True, eq=False, repr=False, init=False)
class NeuronSet:
    """A frozen set of neurons of one neuron space: sorted, unique int64 indices per site; empty sites are left out.

    `a | b`, `a & b`, `a - b` and `a == b` work within one space; mixing spaces raises `InputError`.
    """

    space: NeuronSpace
    _indices: dict[str, Indices]

    def __init__(self, space: NeuronSpace, indices: Mapping[str, Iterable[int] | Indices | torch.Tensor]):
        """
        Raises:
            InputError: an unknown site, or an index outside its site.
        """
        checked = {name: _checked_indices(space.site(name), values) for name, values in indices.items()}
        kept = {site.name: checked[site.name] for site in space.sites if len(checked.get(site.name, ()))}
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "_indices", kept)

    def __reduce__(self) -> tuple[type[NeuronSet], tuple[NeuronSpace, dict[str, Indices]]]:
        """Copies and pickles are made anew, since arrays forget there that they are read-only."""
        return NeuronSet, (self.space, self._indices)

    @property
    def indices(self) -> Mapping[str, Indices]:
        """Site name -> sorted indices, read-only."""
        return MappingProxyType(self._indices)

    def __getitem__(self, site: str) -> Indices:
        self.space.site(site)
        return self._indices.get(site, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return sum(len(values) for values in self._indices.values())

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for name, values in self._indices.items():
            for value in values:
                yield name, int(value)

    def __repr__(self) -> str:
        return f"NeuronSet({len(self)} of {len(self.space)} neurons in {len(self._indices)} sites)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return (
            self.space.fingerprint == other.space.fingerprint
            and self._indices.keys() == other._indices.keys()
            and all(np.array_equal(values, other._indices[name]) for name, values in self._indices.items())
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the space and the indices."""
        digest = hashlib.sha256(self.space.fingerprint.encode())
        for name, values in self._indices.items():
            digest.update(name.encode() + b"\0" + values.astype("<i8").tobytes())
        return digest.hexdigest()

    def __or__(self, other: NeuronSet) -> NeuronSet:
        return self._combined(other, np.union1d)

    def __and__(self, other: NeuronSet) -> NeuronSet:
        return self._combined(other, np.intersect1d)

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        return self._combined(other, np.setdiff1d)

    def _combined(self, other: NeuronSet, operation: Any) -> NeuronSet:
        self.check_space(other.space)
        names = self._indices.keys() | other._indices.keys()
        return NeuronSet(self.space, {name: operation(self[name], other[name]) for name in names})

    def check_space(self, space: NeuronSpace) -> None:
        """
        Raises:
            InputError: `space` is not the space of this set.
        """
        if space.fingerprint != self.space.fingerprint:
            raise InputError(
                f"this neuron set belongs to another neuron space ({self.space.fingerprint[:12]}) than the one given "
                f"({space.fingerprint[:12]}); use sets of the same model and kinds"
            )

    def iou(self, other: NeuronSet) -> float:
        """Overlap as intersection over union, in [0, 1]; 1 for two empty sets."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    @property
    def fraction(self) -> float:
        """Share of the space's neurons."""
        return len(self) / len(self.space)

    @property
    def parameters(self) -> int:
        """Model parameters that the set's neurons own."""
        return sum(len(values) * self.space.site(name).neuron_parameters for name, values in self._indices.items())

    @property
    def parameter_fraction(self) -> float:
        """Share of the model's parameters."""
        return self.parameters / self.space.model_parameters

    def rows(self) -> dict[str, ModuleRows]:
        """The rows or columns that the set owns, module by module, in the order of the space."""
        found: dict[str, list[Indices]] = {}
        sides: dict[str, Side] = {}
        for name, values in self._indices.items():
            for part in self.space.site(name).parts:
                found.setdefault(part.module, []).append(part.positions(values).ravel())
                sides[part.module] = part.side
        return {
            module: ModuleRows(sides[module], np.unique(np.concatenate(positions)))
            for module, positions in found.items()
        }

    def per_row(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each row inherits from its neuron: module name -> (rows,), in the order of `rows()`.

        Args:
            values: site name -> a value for each of the site's neurons (site size,).
        """
        found: dict[str, list[torch.Tensor]] = {}
        places: dict[str, list[torch.Tensor]] = {}
        for name, indices in self._indices.items():
            chosen = values[name][torch.from_numpy(indices.copy())]
            for part in self.space.site(name).parts:
                found.setdefault(part.module, []).append(chosen.repeat_interleave(part.repeats))
                places.setdefault(part.module, []).append(torch.from_numpy(part.positions(indices).ravel()))
        return {module: torch.cat(found[module])[torch.cat(places[module]).argsort()] for module in found}

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Site name -> indices in the smallest unsigned type that holds the site (2 bytes a neuron up to 65,536)."""
        return {
            name: torch.from_numpy(values.astype(np.uint16 if self.space.site(name).size <= 1 << 16 else np.uint32))
            for name, values in self._indices.items()
        }

    @classmethod
    def from_tensors(cls, space: NeuronSpace, tensors: Mapping[str, torch.Tensor]) -> NeuronSet:
        return cls(space, {name: tensor.numpy() for name, tensor in tensors.items()})

    def save(self, path: PathLike) -> None:
        """Write the set and its space's description to one safetensors file."""
        save_tensors(path, _FILE_KIND, self.to_tensors(), {"space": self.space.to_dict()})

    @classmethod
    def load(cls, path: PathLike, space: NeuronSpace | None = None) -> NeuronSet:
        """Read a set; with `space`, refuse one that belongs elsewhere.

        Raises:
            InputError: no such file, not a neuron set, or a set of another space.
            FailedError: the file is corrupt.
        """
        tensors, description = load_tensors(path, _FILE_KIND)
        with understood(path):
            loaded = cls.from_tensors(NeuronSpace.from_dict(description["space"]), tensors)
        if space is not None:
            loaded.check_space(space)
        return loaded


def _could_be(site: Site) -> bool:
    """Whether a model may have such a site, so that nothing overflows that is computed of it."""
    sizes, counts = [site.size], [0]
    for part in site.parts:
        sizes += [part.width, part.block, part.stride, part.repeats]
        counts += [part.offset, part.repeat_stride]
        if not isinstance(part.module, str) or part.side not in get_args(Side):
            return False
    if not all(type(number) is int and 0 <= number < _LARGEST for number in (*sizes, *counts)) or min(sizes) < 1:
        return False
    few = site.parts and all(part.repeats <= _MOST_REPEATS for part in site.parts)
    return bool(few) and isinstance(site.name, str) and site.kind in KINDS


def _checked_indices(site: Site, values: Iterable[int] | Indices | torch.Tensor) -> Indices:
    array = np.unique(np.asarray(values if isinstance(values, np.ndarray | torch.Tensor) else list(values)))
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"indices of site {site.name!r} must be integers, not {array.dtype}")
    array = array.astype(np.int64)
    if len(array) and (array[0] < 0 or array[-1] >= site.size):
        wrong = array[0] if array[0] < 0 else array[-1]
        raise InputError(f"neuron {wrong} is outside site {site.name!r}, which has neurons 0 to {site.size - 1}")
    array.flags.writeable = False
    return array


def _checked_kinds(kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    kinds = tuple(kinds)
    if not kinds:
        raise InputError(f"kinds is empty; name at least one of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"unknown kind of neuron {kind!r}; {nearest(kind, KINDS)}")
    if "ffn" in kinds and {"ffn_in", "ffn_out"} & set(kinds):
        raise InputError(f"kinds {list(kinds)} share weights: take ffn, or ffn_in and ffn_out")
    return tuple(dict.fromkeys(kinds))


def _unique_parameters(model: nn.Module) -> int:
    """Parameters of the base model, tied ones counted once, those of adapters left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name in module.adapter_layer_names
        for parameter in getattr(module, name).parameters()
    }
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A quantised weight may hold several of the matrix's values in each of its elements.
            if isinstance(module, nn.Linear) and name == "weight":
                sizes[id(parameter)] = module.out_features * module.in_features
            else:
                sizes[id(parameter)] = parameter.numel()
    return sum(size for parameter, size in sizes.items() if parameter not in adapters)


def _sites_of_kind(kind: Kind, modules: Mapping[str, nn.Module], anatomy: Anatomy, config: Any) -> list[Site]:
    sites: list[Site] = []
    if kind in ("ffn", "ffn_in", "ffn_out"):
        for block in anatomy.ffn:
            for prefix in _prefixes(modules, block.up, block.down, block.gate):
                sites.append(_ffn_site(kind, prefix, modules, block))
    else:
        for attention in anatomy.attention:
            for prefix in _prefixes(modules, *attention.inputs, attention.output):
                sites.append(_attention_site(kind, prefix, modules, attention, config))
    if not sites:
        raise InputError(
            f"the model has no neurons of kind {kind!r}: none of its modules end as its family's should; "
            "ask for another kind under method.kinds, or name its modules under model.neurons"
        )
    return sites


def _prefixes(modules: Mapping[str, nn.Module], *endings: str | None) -> list[str]:
    """Every prefix under which all the endings name a module: the layers."""
    wanted = [ending for ending in endings if ending]
    found = []
    for name in modules:
        if name == wanted[0] or name.endswith("." + wanted[0]):
            prefix = name[: len(name) - len(wanted[0])]
            if all(prefix + ending in modules for ending in wanted):
                found.append(prefix)
    return found


def matrix_shape(name: str, module: nn.Module) -> tuple[int, int]:
    """(out, in) of a module's weight matrix, however it is stored.

    Raises:
        InputError: the module has no weight matrix (it is no linear layer).
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    linear = isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.is_floating_point()
    if not linear or isinstance(module, nn.Embedding):
        raise InputError(f"module {name!r} ({type(module).__name__}) has no weight matrix to take neurons from")
    out, inner = cast(torch.Tensor, weight).shape
    return (inner, out) if isinstance(module, Conv1D) else (out, inner)


def _ffn_site(kind: Kind, prefix: str, modules: Mapping[str, nn.Module], block: FeedForward) -> Site:
    up, down = prefix + block.up, prefix + block.down
    size, width = matrix_shape(up, modules[up])
    out, inner = matrix_shape(down, modules[down])
    if inner != size:
        raise InputError(f"{up!r} computes {size} neurons but {down!r} reads {inner}: they are not one block")
    if block.gate and matrix_shape(prefix + block.gate, modules[prefix + block.gate]) != (size, width):
        raise InputError(f"{prefix + block.gate!r} has another shape than {up!r}, so it is not its gate")
    row, column = Part(up, "row", width), Part(down, "column", out)
    if kind == "ffn_in":
        parts: tuple[Part, ...] = (row,)
    elif kind == "ffn_out":
        parts = (column,)
    else:
        gate = (Part(prefix + block.gate, "row", width),) if block.gate else ()
        parts = (*gate, row, column)
    return Site(f"{prefix}{kind}", kind, size, parts)


def _attention_site(
    kind: Kind, prefix: str, modules: Mapping[str, nn.Module], attention: Attention, config: Any
) -> Site:
    output = prefix + attention.output
    model_width, channels = matrix_shape(output, modules[output])
    head = attention.head_dim or _head_dim(config)
    if attention.fused:
        query, key, value = _fused_parts(prefix + attention.fused, modules, attention, channels, head)
        size, groups = channels, 1
    else:
        names = {role: f"{prefix}{getattr(attention, role)}" for role in ("query", "key", "value")}
        shapes = {role: matrix_shape(name, modules[name]) for role, name in names.items()}
        size = shapes["value"][0]
        if shapes["query"][0] != channels or shapes["key"][0] != size or channels % size or size % head:
            raise InputError(
                f"{output!r} reads {channels} channels in heads of {head}, which queries, keys and values of "
                f"{shapes['query'][0]}, {shapes['key'][0]} and {size} rows do not make up"
            )
        groups = channels // size
        key, value = (Part(names[role], "row", shapes[role][1]) for role in ("key", "value"))
        query = _grouped(Part(names["query"], "row", shapes["query"][1]), head, groups)
    if kind == "attention":
        parts = (value, _grouped(Part(output, "column", model_width), head, groups))
    else:
        parts = (query, key)
    return Site(f"{prefix}{kind}", kind, size, parts)


def _grouped(part: Part, head: int, groups: int) -> Part:
    """The part of the `groups` query heads that share one key-value head, channel by channel."""
    if groups == 1:
        return part
    return Part(
        part.module, part.side, part.width, block=head, stride=head * groups, repeats=groups, repeat_stride=head
    )


def _fused_parts(
    name: str, modules: Mapping[str, nn.Module], attention: Attention, channels: int, head: int
) -> tuple[Part, Part, Part]:
    """Query, key and value rows of a fused module."""
    out, width = matrix_shape(name, modules[name])
    if out != 3 * channels:
        raise InputError(f"fused module {name!r} has {out} rows, not three times the {channels} that its output reads")
    if attention.fusion == "stacked":
        query, key, value = (Part(name, "row", width, offset=place * channels) for place in range(3))
    else:
        query, key, value = (
            Part(name, "row", width, offset=place * head, block=head, stride=3 * head) for place in range(3)
        )
    return query, key, value


def _head_dim(config: Any) -> int:
    """Channels a head, from a transformers config (`head_dim`, T5's `d_kv`, else hidden size over heads)."""
    for name in ("head_dim", "d_kv"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    if getattr(config, "hidden_size", None) and getattr(config, "num_attention_heads", None):
        return int(config.hidden_size) // int(config.num_attention_heads)
    raise InputError("the model's config does not say how wide a head is; give `head_dim` under model.neurons")
