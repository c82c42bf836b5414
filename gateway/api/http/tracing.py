"""Server spans of the HTTP door, for requests that were let in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import visit as visits
from gateway.api import request_id

if TYPE_CHECKING:
    from gateway.tracing.spans import Tracing

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
NOT_TRACED = frozenset({"/healthz", "/readyz", "/metrics"})


class Traced:
    """ASGI middleware, inside of `Door`. Passes everything on where the getter gives None."""

    def __init__(self, app: ASGIApp, tracing_getter: Callable[[], Tracing | None]) -> None:
        self._app, self._tracing = app, tracing_getter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        tracing = self._tracing() if scope["type"] == "http" else None
        path = scope["path"].removeprefix(scope.get("root_path", "")) if tracing is not None else ""
        if tracing is None or path in NOT_TRACED:
            await self._app(scope, receive, send)
            return
        status, ended = 0, False

        async def seen(message: Message) -> None:
            nonlocal status, ended
            status = message.get("status", status)
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        operation = OPERATIONS.get(path)
        # A path that is not ours would make as many names as a client likes.
        name = f"{scope['method']} {path}" if operation else str(scope["method"])
        attributes: dict[str, str | int | float | bool] = {
            "http.request.method": str(scope["method"]),
            "url.path": path[:256],
            "url.scheme": str(scope.get("scheme", "http")),
        }
        if operation:
            attributes |= {"gen_ai.operation.name": operation, "http.route": path}
        with tracing.call(name, dict(Headers(scope=scope).items()), attributes) as traced:
            try:
                await self._app(scope, receive, seen)
            finally:
                if traced is not None:
                    visit = visits.current.get()
                    error = visit.error if visit is not None else None
                    traced.span.set_attribute("http.response.status_code", status)
                    traced.span.set_attribute("stageline.request.id", request_id.current.get())
                    if not ended:
                        traced.failed("CANCELLED", error)
                    elif error is not None or status >= 400:  # a stream that fails has status 200
                        traced.failed(str(status) if status >= 400 else error.code if error else "", error)
