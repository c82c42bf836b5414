"""The HTTP door: who calls is known before the body is read; every request is a visit, and a line of the audit log."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access import Doorkeeper
from gateway.access import visit as visits
from gateway.api import request_id
from gateway.api.http.errors import error_response
from stageline.errors import StagelineError

OPEN_TO_ALL = frozenset({"/healthz", "/readyz"})  # a probe has no key


class Door:
    """ASGI middleware; sets `gateway.access.visit.current` for the request."""

    def __init__(self, app: ASGIApp, doorkeeper_getter: Callable[[], Doorkeeper]) -> None:
        self._app, self._doorkeeper = app, doorkeeper_getter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_TO_ALL:
            await self._app(scope, receive, send)
            return
        doorkeeper, started_s, status, ended = self._doorkeeper(), time.monotonic(), 0, False

        async def seen(message: Message) -> None:
            nonlocal status, ended
            status = message.get("status", status)
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        visit, problem = None, None
        try:
            visit = doorkeeper.visit(Headers(scope=scope).get("authorization"))
            visit.enter()
        except StagelineError as error:
            problem = error
        token = visits.current.set(visit)
        try:
            await (self._app if problem is None else error_response(problem))(scope, receive, seen)
        finally:
            visits.current.reset(token)
            if visit is not None:
                visit.leave()
            client = scope.get("client")
            doorkeeper.audit.record(
                door="http", method=f"{scope['method']} {scope['path']}", peer=f"{client[0]}:{client[1]}" if client else "",
                request_id=request_id.current.get(), status=str(status) if ended else "CANCELLED",
                duration_s=time.monotonic() - started_s, visit=visit, error=problem,
            )  # fmt: skip
