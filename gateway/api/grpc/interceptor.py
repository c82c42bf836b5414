"""Around every method: typed errors become rich statuses, and a cancelled call has closed its generator at once."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from gateway.api.errors import as_typed
from stageline.errors import InvalidArgumentError
from stageline.grpc_errors import to_status

Handler = Any  # grpc.RpcMethodHandler, which the stubs describe for the synchronous server only

if TYPE_CHECKING:  # generic in the stubs, not when it runs
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class TypedErrors(_Interceptor):
    """Wraps the methods of the services named; the others (health, reflection) pass untouched."""

    def __init__(self, services: tuple[str, ...]) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(self._prefixes):
            return handler
        wrap = {"request_deserializer": _tolerant(handler.request_deserializer)}
        wrap["response_serializer"] = handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, details.method), **wrap)
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, details.method), **wrap)


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    # gRPC answers INTERNAL where a deserializer raises, but bytes that are no message are the client's mistake.
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, UnicodeDecodeError, ValueError):
            return InvalidArgumentError(
                "REQUEST_MALFORMED",
                "the request is not a valid protobuf message of this method (strings must be UTF-8)",
            )

    return parse


def _unary(method: Callable[[Any, Any], Awaitable[Any]], name: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await method(_checked(request), context)
        except Exception as error:
            await _abort(context, error, name)

    return call


def _stream(method: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Awaitable[None]]:
    # A coroutine that writes, not a generator: gRPC leaves a generator that it cancels at a yield to the garbage
    # collector, and the request would keep its KV blocks until then.
    assert inspect.isasyncgenfunction(method)

    async def call(request: Any, context: Any) -> None:
        try:
            async with aclosing(method(_checked(request), context)) as responses:
                async for response in responses:
                    await context.write(response)
        except Exception as error:
            await _abort(context, error, name)

    return call


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidArgumentError):
        raise request
    return request


async def _abort(context: Any, error: Exception, name: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    await context.abort_with_status(rpc_status.to_status(to_status(as_typed(error, where=name))))
