"""The settings of transfer, as a config words them; importable without TRL."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TransferSpec(BaseModel):
    """What a task may start from.

    In a config a bare word means the source: `auto`, `none`, `film` or `film@2`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        "none", description="`auto`: what the registry proposes; `none`; or one recorded task, or `task@version`"
    )
    probe_steps: int = Field(8, gt=0, description="steps that each start is trained for before one is taken")

    @model_validator(mode="before")
    @classmethod
    def _bare_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value
