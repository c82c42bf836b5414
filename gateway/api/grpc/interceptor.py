"""Around every method: the request's name, typed errors as rich statuses, a cancelled call's generator closed at once."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from gateway.api import request_id
from gateway.api.errors import as_typed
from gateway.api.grpc.around import Around, Handler
from gateway.api.stalled import watched
from stageline.errors import InvalidArgumentError
from stageline.grpc_errors import to_status

COMPRESS_BYTES = 16 * 1024  # answers this long are worth gzip; a stream's messages never are


class TypedErrors(Around):
    """Every error a method raises becomes a rich status, every generator is closed with its call."""

    def __init__(self, services: tuple[str, ...], write_timeout_s: float = 600.0) -> None:
        """`write_timeout_s`: how long one message of a stream may wait for its reader."""
        super().__init__(services)
        self._write_timeout_s = write_timeout_s

    def wrapped(self, handler: Handler, method: str) -> Handler:
        """See Around."""
        wrap = {"request_deserializer": _tolerant(handler.request_deserializer)}
        wrap["response_serializer"] = handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, method, self._write_timeout_s), **wrap
            )
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, method), **wrap)


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
        metadata = _name(request, context)
        try:
            response = await method(_checked(request), context)
        except Exception as error:
            await context.send_initial_metadata(metadata)
            await _abort(context, error, name)
        if response.ByteSize() >= COMPRESS_BYTES:
            context.set_compression(grpc.Compression.Gzip)  # gRPC sends it plain to clients that cannot read gzip
        await context.send_initial_metadata(metadata)
        return response

    return call


def _stream(
    method: Callable[[Any, Any], Any], name: str, write_timeout_s: float
) -> Callable[[Any, Any], Awaitable[None]]:
    # A coroutine that writes, not a generator: gRPC leaves a generator that it cancels at a yield to the garbage
    # collector, and the request would keep its KV blocks until then.
    assert inspect.isasyncgenfunction(method)

    async def call(request: Any, context: Any) -> None:
        await context.send_initial_metadata(_name(request, context))
        try:
            async with (
                watched(write_timeout_s) as watch,
                aclosing(method(_checked(request), context)) as responses,
            ):
                async for response in responses:
                    await watch.write(context.write(response))
        except Exception as error:
            await _abort(context, error, name)

    return call


def _name(request: Any, context: Any) -> tuple[tuple[str, str]]:
    """Name the request: by its own field, the call's metadata, or at random. Returns the metadata that tells the client.

    A name that cannot stand in a header is passed over; a door refuses it where it is the request's own field.
    """
    given = dict(context.invocation_metadata() or ()).get(request_id.HEADER)
    name = getattr(getattr(request, "generation", None), "request_id", "") or given
    try:
        name = request_id.check_request_id(str(name)) if name else request_id.new_request_id()
    except InvalidArgumentError:
        name = request_id.new_request_id()
    request_id.current.set(name)
    return ((request_id.HEADER, name),)


def _checked(request: Any) -> Any:
    if isinstance(request, InvalidArgumentError):
        raise request
    return request


async def _abort(context: Any, error: Exception, name: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    await context.abort_with_status(
        rpc_status.to_status(to_status(as_typed(error, where=name), request_id.current.get()))
    )
