"""Routes that need torch: what is near a set, where a new task may start from, and which task a text belongs to."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from registry.server.bases import Bases
from registry.server.replies import BODY_PROBLEMS, PROBLEMS, answer, entry_of, registry_of
from registry.server.schemas import Chosen, Prompt, Wish

router = APIRouter(responses=PROBLEMS | BODY_PROBLEMS, tags=["models"])


@router.post("/suggest")
def suggest(request: Request, body: Wish) -> Response:
    """What a task with the scores of this entry should start from, the best first, with the evidence for each."""
    entry = entry_of(request, body.entry, body.base_model)
    return answer([each.to_dict() for each in registry_of(request).suggest(entry, body.k)])


@router.post("/nearest")
def nearest(request: Request, body: Chosen) -> Response:
    """The entries whose neurons are most like a set's, by intersection over union."""
    from neft.neurons import NeuronSet

    registry = registry_of(request)
    space = registry.neurons(entry_of(request, body.space_of, body.base_model)).space
    return answer([each.to_dict() for each in registry.nearest(NeuronSet(space, body.neurons), body.k)])


@router.post("/route")
def route(request: Request, body: Prompt) -> Response:
    """The entry of a chain that a text belongs to, or null when it is near no task.

    The first call loads the base model, which may take minutes; it is kept until another one is needed. Calls wait for
    one another.
    """
    entry = entry_of(request, body.entry, body.base_model)
    bases: Bases = request.app.state.bases
    return answer({"entry": bases.route(registry_of(request), entry, body.text)})
