"""The request's name, in and out: every response carries `x-request-id`, the client's own or one drawn here."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.http.errors import error_response
from gateway.api.request_id import HEADER, check_request_id, current, new_request_id
from stageline.errors import InvalidArgumentError


class RequestIds:
    """ASGI middleware; sets `gateway.api.request_id.current` for the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        problem = None
        try:
            name = new_request_id() if given is None else check_request_id(given)
        except InvalidArgumentError as error:
            name, problem = new_request_id(), error

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        token = current.set(name)
        try:
            await (self._app if problem is None else error_response(problem))(scope, receive, named)
        finally:
            current.reset(token)
