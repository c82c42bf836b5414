"""Our own failures become answers inside of the middleware that names, counts and audits a request.

A handler that the application has for `Exception` runs outside of it all: its answer has no request id, the audit log
takes the call for one that its client gave up, and the server closes the connection.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import as_typed
from gateway.api.http.errors import error_response


class Failures:
    """ASGI middleware, the innermost: an exception before the response has begun is answered with 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        begun = False

        async def seen(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, seen)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await error_response(as_typed(error, where=f"{scope['method']} {scope['path'][:256]}"))(
                scope, receive, send
            )
