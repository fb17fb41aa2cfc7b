"""How the routes answer: JSON, a stored file, or one sentence that says what is wrong."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from neft.errors import FailedError, InputError, NotFoundError
from registry import Entry, Registry
from registry.artifacts import Artifact
from registry.server.guard import HEADERS, problem
from registry.server.schemas import Problem

_LOG = logging.getLogger(__name__)

#: What every route may answer beside its own, for the OpenAPI page.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "What was named does not exist."},
    414: {"model": Problem, "description": "Path and query are too long."},
    422: {"model": Problem, "description": "What was asked for cannot be."},
    503: {"model": Problem, "description": "The database or the artifact store fails."},
}
#: What a route that reads a body may answer beside those.
BODY_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is no text."},
    413: {"model": Problem, "description": "The body is too large."},
}


def registry_of(request: Request) -> Registry:
    """The registry that is served."""
    registry: Registry = request.app.state.registry
    return registry


def entry_of(request: Request, reference: str, base_model: str | None = None) -> Entry:
    """The entry of a reference.

    Raises:
        InputError: as `Registry.get` has it.
    """
    return registry_of(request).get(reference, base_model=base_model)


def answer(value: Any) -> Response:
    """A value as JSON. What was looked up is checked already, so no schema goes over it again."""
    content = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-cache"})


def file_answer(request: Request, entry: Entry, artifact: Artifact) -> Response:
    """A stored file, after its checksum has been compared; nothing where the client has it already.

    Raises:
        FailedError: it is missing, truncated or altered.
    """
    digest = f"sha-256=:{base64.b64encode(bytes.fromhex(artifact.sha256)).decode()}:"
    # Content under its own digest never changes.
    headers = {"ETag": f'"{artifact.sha256}"', "Cache-Control": "public, max-age=31536000, immutable"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    # RFC 9530: the first is of the bytes that are sent, the second of the whole file.
    headers |= {} if "range" in request.headers else {"Content-Digest": digest}
    headers["Repr-Digest"] = digest
    path = registry_of(request).artifacts.fetch(artifact, entry.reference)
    name = f"{entry.task}-{entry.version}-{artifact.name}.safetensors"
    return FileResponse(path, media_type="application/octet-stream", headers=headers, filename=name)


def answer_problems(app: FastAPI) -> None:
    """Let every refusal and failure be one sentence, without a trace of the program."""

    @app.exception_handler(InputError)
    def refused(request: Request, error: InputError) -> JSONResponse:
        return problem(404 if isinstance(error, NotFoundError) else 422, str(error))

    @app.exception_handler(FailedError)
    def failed(request: Request, error: FailedError) -> JSONResponse:
        return problem(503, str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem(422, "; ".join(_complaint(each) for each in error.errors()))

    @app.exception_handler(StarletteHTTPException)
    def http(request: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return problem(404, f"there is nothing at {request.url.path}; /api/docs lists what there is", headers)
        if error.status_code == 405:
            return problem(405, f"{request.method} is not possible at {request.url.path}; see /api/docs", headers)
        return problem(error.status_code, str(error.detail), headers)

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> JSONResponse:
        # This answer is made outside `Guard`, and so needs its headers here.
        _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "the server failed; its log says why", HEADERS)


def _complaint(error: Any) -> str:
    """One thing that is wrong with a request, as pydantic found it."""
    where = ".".join(str(part) for part in error["loc"][1:]) or error["loc"][0]
    return f"{error['loc'][0]} {where}: {error['msg']}"
