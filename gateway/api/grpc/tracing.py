"""Server spans of the gRPC door, for calls that were let in; installed only where traces are on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from gateway.access import visit as visits
from gateway.api import request_id
from gateway.api.grpc.around import Around, Handler

if TYPE_CHECKING:
    from gateway.tracing.spans import Tracing

OPERATIONS = {"Generate": "generate_content", "StreamGenerate": "generate_content", "Score": "score"}


class Traced(Around):
    """A span for every call; between `Door` and `TypedErrors`."""

    def __init__(self, tracing: Tracing, services: tuple[str, ...]) -> None:
        super().__init__(services)
        self._tracing = tracing

    def wrapped(self, handler: Handler, method: str) -> Handler:
        """See Around."""
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(
            self._around(inner, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _around(self, inner: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
        name = method.removeprefix("/")
        attributes: dict[str, str | int | float | bool] = {"rpc.system.name": "grpc", "rpc.method": name}
        if operation := OPERATIONS.get(name.rpartition("/")[2]):
            attributes["gen_ai.operation.name"] = operation

        async def call(request: Any, context: Any) -> Any:
            headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            with self._tracing.call(name, headers, attributes) as traced:
                code = "OK"
                try:
                    return await inner(request, context)
                except asyncio.CancelledError:
                    code = "CANCELLED"
                    raise
                except BaseException:
                    visit = visits.current.get()
                    code = visit.error.code if visit is not None and visit.error is not None else "UNKNOWN"
                    raise
                finally:
                    if traced is not None:
                        traced.span.set_attribute("rpc.response.status_code", code)
                        traced.span.set_attribute("stageline.request.id", request_id.current.get())
                        if code != "OK":
                            visit = visits.current.get()
                            traced.failed(code, visit.error if visit is not None else None)

        return call
