"""Routes that look streams up: newest entry, overlaps of the tasks, R matrix; and the health check."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from neft.errors import NotFoundError, nearest
from registry.server.replies import PROBLEMS, answer, registry_of
from registry.server.schemas import Stream

router = APIRouter(responses=PROBLEMS, tags=["streams"])


@router.get("/streams")
def streams(request: Request) -> Response:
    """The names of all streams, sorted."""
    return answer(_names(request))


@router.get("/streams/{stream}/overlaps")
def overlaps(request: Request, stream: Stream) -> Response:
    """How many neurons each two of the stream's tasks share, the newest version of each, in learning order."""
    return answer(registry_of(request).overlaps(stream).to_dict())


@router.get("/streams/{stream}/curve")
def curve(request: Request, stream: Stream) -> Response:
    """The R matrix of the stream's newest run: the score on each task after each task was learnt."""
    run = registry_of(request).newest_run(stream)
    matrix = run.matrix or {"tasks": list(run.tasks), "rows": [], "examples": [0] * len(run.tasks)}
    return answer(
        {
            "stream": run.stream,
            "run": run.id,
            "status": run.status,
            "matrix": matrix,
            "metrics": run.metrics or {},
            "mlflow_run_id": run.mlflow_run_id,
            "mlflow_experiment_id": (run.tracking or {}).get("experiment_id"),
            "prefect_flow_run_id": run.prefect_flow_run_id,
        }
    )


@router.get("/streams/{stream}")
def stream(request: Request, stream: Stream) -> Response:
    """A stream's newest entry."""
    quoted = stream.replace("'", "''")
    found = registry_of(request).search(f"stream = '{quoted}'", order_by=["created DESC"], max_results=1)
    if not found.entries:
        known = _names(request)
        raise NotFoundError(
            f"no entry of stream {stream!r}; " + (nearest(stream, known) if known else "nothing is recorded")
        )
    newest = found.entries[0]
    return answer({"stream": stream, "newest": newest.reference, "base_model": newest.base_model.fingerprint})


@router.get("/health", tags=["server"])
def health(request: Request) -> Response:
    """That the server and its database answer, and where its pages' links lead."""
    registry_of(request).streams()
    state = request.app.state
    return answer(
        {
            "status": "ok",
            "neft": request.app.version,
            "writable": state.token is not None,
            "links": state.links.to_dict(),
        }
    )


def _names(request: Request) -> list[str]:
    """Streams that were run, and those of entries that were recorded without a run."""
    registry = registry_of(request)
    return sorted({*registry.streams(), *(name for task in registry.tasks() for name in task.streams)})
