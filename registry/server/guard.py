"""What stands between a client and the routes: bounds on all that is read of a request, and headers on every answer."""

from __future__ import annotations

import hmac

from fastapi import HTTPException, Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Bytes that are read of a body, and of a request's path and query, at most.
BODY_LIMIT, TARGET_LIMIT = 2**20, 2**14

#: Nothing but this server's own files is loaded or run, nobody may frame it, and no other site may read it.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI middleware that refuses what is too large, as it arrives, and adds `HEADERS` to each answer."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY_LIMIT:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (_refusal(scope) or self._app)(scope, bounded, headed)


_TOO_LARGE = f"the body is larger than {BODY_LIMIT} bytes; send less"


def _refusal(scope: Scope) -> JSONResponse | None:
    """What is answered to a request that is refused before any of its body is read."""
    target = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if target > TARGET_LIMIT:
        return problem(414, f"path and query together are longer than {TARGET_LIMIT} bytes; send less")
    if "\0" in scope["path"] or b"%00" in scope["query_string"]:
        return problem(422, "the address holds a NUL character, which no name has")
    # A length that is declared need not be true: what arrives is counted all the same.
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > BODY_LIMIT:
        return problem(413, _TOO_LARGE)
    return None


def problem(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """How everything that is refused is answered."""
    return JSONResponse({"detail": sentence}, status, headers)


async def may_write(request: Request) -> None:
    """A dependency of the routes that write.

    Raises:
        HTTPException: the server has no token, or the request does not carry it.
    """
    token: str | None = request.app.state.token
    if token is None:
        raise HTTPException(403, "this server only reads; set NEFT_TOKEN and start it again to write aliases and tags")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise HTTPException(
            401,
            "writing needs the header `Authorization: Bearer TOKEN`, with the token of the server",
            {"WWW-Authenticate": "Bearer"},
        )
