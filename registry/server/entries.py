"""Routes that look entries up: tasks, search, an entry and all that belongs to it, owners, overlaps, differences."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from neft.errors import NotFoundError
from registry.server.replies import PROBLEMS, answer, entry_of, file_answer, registry_of
from registry.server.schemas import (
    Base,
    Count,
    File,
    Filter,
    Likeness,
    Named,
    Neuron,
    Order,
    PageToken,
    Reference,
    Site,
    Task,
)

router = APIRouter(responses=PROBLEMS, tags=["entries"])


@router.get("/tasks")
def tasks(request: Request) -> Response:
    """Every task, with how many versions it has, the newest of them, its streams, aliases and tags."""
    return answer([each.to_dict() for each in registry_of(request).tasks()])


@router.get("/tasks/{task}")
def task_versions(request: Request, task: Task, base_model: Base = None) -> Response:
    """A task's versions, oldest first, with the tags of each, and its aliases."""
    registry = registry_of(request)
    newest = registry.get(task, base_model=base_model)
    fingerprint = newest.base_model.fingerprint
    versions = [each for each in registry.list(task=newest.task) if each.base_model.fingerprint == fingerprint]
    return answer(
        {
            "task": newest.task,
            "versions": [each.to_dict() | {"tags": dict(registry.tags(each))} for each in versions],
            "aliases": dict(registry.aliases_of(newest.task, fingerprint)),
        }
    )


@router.get("/search")
def search(
    request: Request,
    filter: Filter = "",  # noqa: A002 - as MLflow's search calls it
    order_by: Order = None,
    max_results: Count = 100,
    page_token: PageToken = None,
) -> Response:
    """The entries that a filter finds, and the token of the next page.

    A filter compares `task`, `version`, `stream`, `base_model`, `alias`, `parent`, `neurons`, `created`, ...,
    `tags.KEY` and metrics.`NAME` by `=`, `!=`, `<`, `<=`, `>`, `>=`, `LIKE`, `ILIKE`, `IN` and `IS NULL`, joined by
    `AND`, `OR` and `NOT`.
    """
    found = registry_of(request).search(filter, order_by=order_by or (), max_results=max_results, page_token=page_token)
    return answer(found.to_dict())


@router.get("/entries/{reference}/neurons")
def neurons(request: Request, reference: Reference, base_model: Base = None) -> Response:
    """The entry's neurons: site -> their indices."""
    found = registry_of(request).indices(entry_of(request, reference, base_model))
    return answer({site: indices.tolist() for site, indices in found.items()})


@router.get(
    "/entries/{reference}/files/{name}",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}, "description": "The safetensors file."},
        304: {"description": "The client's copy, of this ETag, is the file."},
    },
)
def file(
    request: Request,
    reference: Reference,
    name: File,
    base_model: Base = None,
) -> Response:
    """A file of the entry, as it lies in the artifact store, with its SHA-256 in `Content-Digest`."""
    entry = entry_of(request, reference, base_model)
    for artifact in entry.files:
        if artifact.name == name:
            return file_answer(request, entry, artifact)
    has = ", ".join(each.name for each in entry.files)
    raise NotFoundError(f"{entry.reference} has no {name}; it has {has}")


@router.get("/entries/{reference}/capacity")
def capacity(request: Request, reference: Reference, base_model: Base = None) -> Response:
    """Who owns how much of each site after the entry, and what is free; forgotten entries own nothing."""
    registry, entry = registry_of(request), entry_of(request, reference, base_model)
    return answer(
        {
            "entry": entry.reference,
            "learnt": [each.reference for each in registry.learnt(entry)],
            "sites": [each.to_dict() for each in registry.capacity(entry)],
        }
    )


@router.get("/entries/{reference}/lineage")
def lineage(request: Request, reference: Reference, base_model: Base = None) -> Response:
    """The tree that the entry stands in, from its root."""
    return answer(registry_of(request).lineage(entry_of(request, reference, base_model)).to_dict())


@router.get("/entries/{reference}/strongest")
def strongest(request: Request, reference: Reference, k: Count = 20, base_model: Base = None) -> Response:
    """The neurons with the highest scores for the task, and whether the entry owns them."""
    entry = entry_of(request, reference, base_model)
    return answer([each.to_dict() for each in registry_of(request).strongest(entry, k)])


@router.get("/entries/{reference}/nearest")
def nearest(
    request: Request, reference: Reference, k: Count = 10, by: Likeness = "neurons", base_model: Base = None
) -> Response:
    """The entries whose neurons are most like the entry's, by intersection over union; or whose scores are."""
    entry = entry_of(request, reference, base_model)
    return answer([each.to_dict() for each in registry_of(request).nearest(entry, k, by=by)])


@router.get("/entries/{reference}")
def entry(request: Request, reference: Reference, base_model: Base = None) -> Response:
    """One entry: all that was recorded of it, its aliases and tags, and how many neurons it has in each site."""
    return answer(registry_of(request).describe(reference, base_model))


@router.get("/owners")
def owners(request: Request, site: Site, neuron: Neuron = None, base_model: Base = None) -> Response:
    """The entries that own a neuron, or any neuron of a site and how many."""
    return answer([each.to_dict() for each in registry_of(request).owners(site, neuron, base_model=base_model)])


@router.get("/overlap")
def overlap(request: Request, first: Named, second: Named, base_model: Base = None) -> Response:
    """How many neurons two entries share, in which sites."""
    pair = [entry_of(request, each, base_model) for each in (first, second)]
    return answer(registry_of(request).overlap(*pair).to_dict())


@router.get("/diff")
def diff(request: Request, first: Named, second: Named, base_model: Base = None) -> Response:
    """What differs between two entries: neurons by site, and method, training, metrics and data."""
    pair = [entry_of(request, each, base_model) for each in (first, second)]
    return answer(registry_of(request).diff(*pair).to_dict())
