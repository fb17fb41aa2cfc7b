"""What a request may hold: the types of paths, queries and bodies, each with its bound."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, BaseModel, Field

#: The largest number that every database knows as an integer.
_LARGEST = 2**31 - 1


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a NUL character, which no name has")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]

_ENTRY = "A task (its newest version), TASK@VERSION, or TASK@ALIAS."
_BASE = "The base model's name, or how its fingerprint begins: for a task of several."

Reference = Annotated[str, Path(max_length=1000, description=_ENTRY)]
Task = Annotated[str, Path(max_length=1000, description="A task's name.")]
Stream = Annotated[str, Path(max_length=1000, description="A stream's name.")]
Alias = Annotated[str, Path(max_length=250, description="A letter, then letters, digits, `.`, `_` and `-`.")]
Key = Annotated[str, Path(max_length=250, description="The tag's key.")]
File = Annotated[Literal["overlay", "scores", "memory", "signature"], Path(description="Which of the entry's files.")]
Base = Annotated[str | None, Query(max_length=1000, description=_BASE)]
Count = Annotated[int, Query(ge=1, le=1000, description="How many at most, up to 1000.")]
Likeness = Annotated[Literal["neurons", "scores"], Query(description="What is compared.")]
Named = Annotated[str, Query(max_length=1000, description=_ENTRY)]
Neuron = Annotated[int | None, Query(ge=0, le=_LARGEST, description="Its index in the site; without it, any.")]
Site = Annotated[str, Query(max_length=1000, description="A site, such as `model.layers.3.ffn`.")]
Filter = Annotated[str, Query(max_length=4000, description="Such as `task = 'film' AND neurons > 100`; empty for all.")]
Order = Annotated[
    list[Annotated[str, Field(max_length=1000)]] | None,
    Query(max_length=20, description="Such as `created DESC`; several are taken in turn."),
]
PageToken = Annotated[str | None, Query(max_length=1000, description="`next_token` of the page before.")]


class Problem(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


class Wish(BaseModel):
    """Whose scores to find a start for, and how many proposals to make."""

    entry: Text = Field(max_length=1000, description=_ENTRY)
    k: int = Field(default=5, ge=1, le=1000, description="How many proposals at most, up to 1000.")
    base_model: Text | None = Field(default=None, max_length=1000, description=_BASE)


class Chosen(BaseModel):
    """A neuron set, of the neuron space of an entry, and how many entries near it to find."""

    space_of: Text = Field(max_length=1000, description=_ENTRY)
    neurons: dict[Text, list[Annotated[int, Field(ge=0, le=_LARGEST)]]] = Field(description="Site -> neurons.")
    k: int = Field(default=10, ge=1, le=1000, description="How many at most, up to 1000.")
    base_model: Text | None = Field(default=None, max_length=1000, description=_BASE)


class Prompt(BaseModel):
    """A text, and the entry among whose chain its task is sought."""

    entry: Text = Field(max_length=1000, description=_ENTRY)
    text: Text = Field(min_length=1, max_length=100_000, description="As the tasks' template renders it.")
    base_model: Text | None = Field(default=None, max_length=1000, description=_BASE)


class Aliased(BaseModel):
    """Which version an alias is to name."""

    version: int = Field(ge=1, le=_LARGEST, description="1 and up.")


class Tagged(BaseModel):
    """What a tag is to say."""

    value: Text = Field(max_length=5000, description="Any text, up to 5000 characters.")
