"""The server: one registry's look-ups over HTTP, and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from registry import Registry
from registry.server import entries, labelling, models, streams
from registry.server.bases import Bases
from registry.server.guard import Guard
from registry.server.links import Links
from registry.server.replies import answer_problems

_PAGE = Path(__file__).parent / "page"

_DESCRIPTION = """What a language model has learnt, task by task, and with which neurons.

Everything can be read without a token. Aliases and tags are written with the header `Authorization: Bearer TOKEN`.
An entry is named by its task (the newest version), by `TASK@3`, or by `TASK@ALIAS`.
"""


def create_app(
    registry: Registry, token: str | None = None, links: Links | None = None, hosts: Sequence[str] = ()
) -> FastAPI:
    """The application that serves a registry.

    Args:
        registry: open; who serves it closes it.
        token: what a request must carry to write aliases and tags; without one, nothing can be written.
        links: where the runs that made the entries are shown.
        hosts: the names by which the server may be asked; any, unless some are given. On a loopback address this keeps
            out a site elsewhere whose name was pointed here to read it through a browser.
    """
    app = FastAPI(
        title="neft registry",
        version=version("neft"),
        description=_DESCRIPTION,
        openapi_url="/api/openapi.json",
        # FastAPI's own pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.registry, app.state.token, app.state.links = registry, token or None, links or Links()
    app.state.bases = Bases()
    answer_problems(app)
    for routes in (entries.router, streams.router, models.router, labelling.router):
        app.include_router(routes, prefix="/api")

    @app.get("/api/docs", include_in_schema=False)
    def docs() -> FileResponse:
        return FileResponse(_PAGE / "docs.html")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE))
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(Guard)
    return app
