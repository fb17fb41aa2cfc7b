"""Routes that write: aliases and tags, with the server's token."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from registry.server.guard import may_write
from registry.server.replies import BODY_PROBLEMS, PROBLEMS, answer, entry_of, registry_of
from registry.server.schemas import Alias, Aliased, Base, Key, Problem, Reference, Tagged, Task

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The token is missing or wrong."},
    403: {"model": Problem, "description": "The server only reads."},
}
router = APIRouter(responses=PROBLEMS | BODY_PROBLEMS | _REFUSALS, tags=["writing"], dependencies=[Depends(may_write)])


@router.put("/tasks/{task}/aliases/{alias}")
def set_alias(request: Request, task: Task, alias: Alias, body: Aliased, base_model: Base = None) -> Response:
    """Let an alias of a task name a version, whatever it has named before."""
    entry = registry_of(request).set_alias(task, alias, body.version, base_model)
    return answer({"alias": alias, "entry": entry.reference})


@router.delete("/tasks/{task}/aliases/{alias}", status_code=204)
def delete_alias(request: Request, task: Task, alias: Alias, base_model: Base = None) -> Response:
    """Let an alias of a task name nothing any more."""
    registry_of(request).delete_alias(task, alias, base_model)
    return Response(status_code=204)


@router.put("/entries/{reference}/tags/{key:path}")
def set_tag(request: Request, reference: Reference, key: Key, body: Tagged, base_model: Base = None) -> Response:
    """Note a value under a key of an entry, in place of what was noted there."""
    entry = entry_of(request, reference, base_model)
    registry_of(request).set_tag(entry, key, body.value)
    return answer({"entry": entry.reference, "key": key, "value": body.value})


@router.delete("/entries/{reference}/tags/{key:path}", status_code=204)
def delete_tag(request: Request, reference: Reference, key: Key, base_model: Base = None) -> Response:
    """Take a tag off an entry."""
    registry_of(request).delete_tag(entry_of(request, reference, base_model), key)
    return Response(status_code=204)
