"""The manifest of a bundle: what `manifest.json` may say of an entry's chain, checked before anything of it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, Base64Bytes, BaseModel, ConfigDict, Field, model_validator

from neft.models import Dtype
from neft.neurons import Kind, NeuronSpace, Side
from registry.artifacts import Artifact
from registry.labels import LONGEST_NAME, LONGEST_VALUE
from registry.text import check_name, is_text, plain

#: Most entries of a bundle, and sites of a neuron space.
MOST = 100_000


def _checked_name(name: str) -> str:
    check_name("the name", name)
    return name


def _checked_text(text: str) -> str:
    if not is_text(text):
        raise ValueError("holds a NUL character, or half a character")
    return text


def _checked_json(value: dict[str, Any]) -> dict[str, Any]:
    return dict(plain("what stands here", value))


def _checked_time(moment: datetime) -> datetime:
    if not 1970 <= moment.year <= 9998:  # no database keeps years beyond 9999, whatever the time zone
        raise ValueError("is not between the years 1970 and 9998")
    return moment


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(_checked_name)]
Text = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_checked_text)]
Json = Annotated[dict[str, Any], AfterValidator(_checked_json)]
Moment = Annotated[AwareDatetime, AfterValidator(_checked_time)]
Count = Annotated[int, Field(ge=1)]
Offset = Annotated[int, Field(ge=0)]
Parameters = Annotated[int, Field(ge=1, le=2**50)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PartRecord(_Record):
    """`neft.neurons.Part`."""

    module: Text
    side: Side
    width: Count
    offset: Offset
    block: Count
    stride: Offset
    repeats: Count
    repeat_stride: Offset


class SiteRecord(_Record):
    """`neft.neurons.Site`."""

    name: Text
    kind: Kind
    size: Count
    parts: Annotated[list[PartRecord], Field(min_length=1, max_length=100)]


class SpaceRecord(_Record):
    """`neft.neurons.NeuronSpace`, as its `to_dict` describes it."""

    sites: Annotated[list[SiteRecord], Field(min_length=1, max_length=MOST)]
    model_parameters: Parameters

    @model_validator(mode="after")
    def _could_be(self) -> SpaceRecord:
        if len(self.space) >= 2**32:
            raise ValueError("has more neurons than a bitmap can number")
        return self

    @cached_property
    def space(self) -> NeuronSpace:
        return NeuronSpace.from_dict(self.model_dump())


class FileRecord(_Record):
    """A file of the bundle, `files/<sha256>.safetensors`."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=2**50)]


class FilesRecord(_Record):
    """The files of an entry."""

    overlay: FileRecord
    scores: FileRecord | None
    memory: FileRecord | None
    signature: FileRecord | None

    def present(self) -> dict[str, FileRecord]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: file for name, file in found.items() if file is not None}


class BaseModelRecord(_Record):
    """`registry.records.BaseModel`."""

    fingerprint: Sha256
    name: Text
    dtype: Dtype
    config: Json
    parameters: Parameters


class EntryRecord(_Record):
    """An entry without its version, which every registry counts for itself; other entries go by their input digests."""

    task: Name
    stream: Name
    input_digest: Text
    parent: Text | None
    reused_from: Text | None
    forgets: Text | None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    data_fingerprint: Text
    method: Json
    training: Json
    space: Sha256
    neurons: Base64Bytes
    files: FilesRecord
    state_digest: Sha256
    metrics: Json
    audit: Json
    mlflow_run_id: Text | None
    prefect_flow_run_id: Text | None
    versions: Json
    created_at: Moment
    tags: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_checked_text)],
            Annotated[str, Field(max_length=LONGEST_VALUE), AfterValidator(_checked_text)],
        ],
        Field(max_length=1000),
    ]


class Manifest(_Record):
    """A chain of entries on one base model, root first, and the neuron spaces that they chose from."""

    format: Literal["neft-bundle"]
    version: Literal[1]
    base_model: BaseModelRecord
    spaces: dict[Sha256, SpaceRecord]
    entries: Annotated[list[EntryRecord], Field(min_length=1, max_length=MOST)]

    @model_validator(mode="after")
    def _one_chain(self) -> Manifest:
        before: dict[str, EntryRecord] = {}
        parent = None
        for entry in self.entries:
            if entry.input_digest in before:
                raise ValueError(f"entry {entry.input_digest[:12]} stands in it twice")
            if entry.parent != parent:
                raise ValueError(f"entry {entry.input_digest[:12]} is not built on the one before it")
            if entry.forgets is not None and entry.forgets not in before:
                raise ValueError(f"entry {entry.input_digest[:12]} forgets what is not in its chain")
            before[entry.input_digest] = entry
            parent = entry.input_digest
        return self

    @model_validator(mode="after")
    def _its_spaces(self) -> Manifest:
        if {entry.space for entry in self.entries} != self.spaces.keys():
            raise ValueError("the neuron spaces are not those of the entries")
        for name, record in self.spaces.items():
            if record.space.fingerprint != name:
                raise ValueError(f"neuron space {name[:12]} is not the one that its fingerprint says")
        check_widths(self.descriptions.values())
        return self

    @cached_property
    def descriptions(self) -> Mapping[str, Mapping[str, Any]]:
        """Fingerprint -> description of every neuron space."""
        return {name: record.model_dump() for name, record in self.spaces.items()}

    @model_validator(mode="after")
    def _its_files(self) -> Manifest:
        sizes: dict[str, int] = {}
        for entry in self.entries:
            for file in entry.files.present().values():
                if sizes.setdefault(file.sha256, file.bytes) != file.bytes:
                    raise ValueError(f"file {file.sha256[:12]} has two sizes")
        return self

    @cached_property
    def files(self) -> Mapping[str, Artifact]:
        """SHA-256 -> what it is, and its size, of every file that the entries name."""
        return {
            file.sha256: Artifact(kind, file.sha256, file.bytes)
            for entry in self.entries
            for kind, file in entry.files.present().items()
        }


def check_widths(descriptions: Iterable[Mapping[str, Any]]) -> None:
    """Check that neuron spaces, as `NeuronSpace.to_dict` describes them, may belong to one model.

    Raises:
        ValueError: the rows or columns of a matrix have another length in one of them than in another.
    """
    found: dict[tuple[str, str], int] = {}
    for description in descriptions:
        for part in (part for site in description["sites"] for part in site["parts"]):
            if found.setdefault((part["module"], part["side"]), part["width"]) != part["width"]:
                raise ValueError(f"the {part['side']}s of module {part['module']!r} have two widths")
