"""Answers that end with their client: whole (JSON) or streamed (server-sent events)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gateway.api.errors import as_typed
from gateway.api.http.errors import error_object, error_response
from gateway.api.stalled import watched
from stageline.errors import ResourceExhaustedError

DONE = b"data: [DONE]\n\n"


class AnswerResponse(Response):
    """Sends what `objects` yields: one JSON object, or with `streamed` one event each and `[DONE]`.

    The status waits for the first object, so an error before it has its own status; a later one is an event, and the
    stream ends without `[DONE]`, as it does when a piece of it waits `write_timeout_s` for its reader. When the client goes, `objects` is closed at once, also between two tokens and also
    where nothing is streamed (starlette's own StreamingResponse leaves that to the garbage collector).
    """

    def __init__(
        self, objects: AsyncGenerator[dict[str, Any]], *, streamed: bool, where: str, write_timeout_s: float
    ) -> None:
        super().__init__()
        self._write_timeout_s = write_timeout_s
        self._objects, self._streamed, self._where = objects, streamed, where

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        work = asyncio.create_task(self._send(scope, receive, send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            outcome, _ = await asyncio.gather(work, gone, return_exceptions=True)
        # OSError: the client went while we wrote.
        if isinstance(outcome, Exception) and not isinstance(outcome, OSError):
            raise outcome

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with watched(self._write_timeout_s) as watch:
                await self._answer(scope, receive, lambda message: watch.write(send(message)))
        except ResourceExhaustedError as error:  # the client cannot be told: what it does not read is before it
            raise ConnectionAbortedError(error.message) from None

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._objects) as objects:
            try:
                first = await anext(objects)
            except Exception as error:
                await error_response(as_typed(error, where=self._where))(scope, receive, send)
                return
            if not self._streamed:
                await JSONResponse(first)(scope, receive, send)
                return
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _event(send, first)
            try:
                async for item in objects:
                    await _event(send, item)
            except OSError:
                raise
            except Exception as error:
                await _event(send, error_object(as_typed(error, where=self._where)))
            else:
                await send({"type": "http.response.body", "body": DONE, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _event(send: Send, item: dict[str, Any]) -> None:
    data = json.dumps(item, ensure_ascii=False, separators=(",", ":"))
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
