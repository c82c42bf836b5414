"""A bound on the size of request bodies, before anything parses them."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.http.errors import error_object
from stageline.errors import InvalidArgumentError

TOO_LARGE = 413


class BodyLimit:
    """ASGI middleware: 413 in OpenAI's form for a body over `max_body_bytes`, whether its length was declared or not.

    `larger`: path → the bound there.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, larger: Mapping[str, int] | None = None) -> None:
        self._app, self._limit, self._larger = app, max_body_bytes, larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._larger.get(scope["path"], self._limit)
        problem = f"the body may have at most {limit} bytes"
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(TOO_LARGE, problem)  # the application's handler writes it
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            error = InvalidArgumentError("BODY_TOO_LARGE", problem)
            await JSONResponse(error_object(error), status_code=TOO_LARGE)(scope, receive, send)
            return
        await self._app(scope, counted, send)
