"""The gRPC door: who calls is known before a message is read; every call is a visit, and a line of the audit log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from gateway.access import Audit, Doorkeeper, Visit
from gateway.access import visit as visits
from gateway.api import request_id
from gateway.api.request_id import check_request_id, new_request_id
from stageline.errors import InvalidArgumentError, PermissionDeniedError, StagelineError
from stageline.grpc_errors import to_status

Handler = Any  # grpc.RpcMethodHandler, which the stubs describe for the synchronous server only
AUTHORIZATION = "authorization"

if TYPE_CHECKING:  # generic in the stubs, not when it runs
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class Door(_Interceptor):
    """`visited`: services whose calls count, `operators` the ones among them for operators only. Of the other services
    those in `open_to_all` (health: a probe has no key) need no key, and the rest (reflection) does."""

    def __init__(
        self,
        doorkeeper: Doorkeeper,
        *,
        visited: tuple[str, ...],
        operators: tuple[str, ...],
        open_to_all: tuple[str, ...],
    ) -> None:
        self._doorkeeper = doorkeeper
        self._visited, self._operators, self._open = _prefixes(visited), _prefixes(operators), _prefixes(open_to_all)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        """See grpc.aio.ServerInterceptor."""
        method, visit = details.method, None
        if method.startswith(self._open):
            return await continuation(details)
        try:
            visit = self._doorkeeper.visit(dict(details.invocation_metadata or ()).get(AUTHORIZATION))
            visit.enter()
            if method.startswith(self._operators) and not visit.operator:
                raise PermissionDeniedError(
                    "OPERATORS_ONLY", f"{method} is for operators; tenant {visit.account.tenant!r} is not marked as one",
                    tenant=visit.account.tenant,
                )  # fmt: skip
        except StagelineError as error:
            return _refusal(self._doorkeeper.audit, method, visit, error)
        handler = await continuation(details)
        if handler is None or not method.startswith(self._visited):
            return handler
        wrap = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            call = _visiting(handler.unary_stream, self._doorkeeper.audit, method, visit)
            return grpc.unary_stream_rpc_method_handler(call, **wrap)
        call = _visiting(handler.unary_unary, self._doorkeeper.audit, method, visit)
        return grpc.unary_unary_rpc_method_handler(call, **wrap)


def _prefixes(services: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"/{service}/" for service in services)


def _visiting(inner: Callable[[Any, Any], Awaitable[Any]], audit: Audit, method: str, visit: Visit) -> Any:
    """`inner` is a coroutine function for both kinds of methods: streams are written, not yielded."""

    async def call(request: Any, context: Any) -> Any:
        started_s, status = time.monotonic(), "OK"
        visits.current.set(visit)  # of this call's own task
        try:
            return await inner(request, context)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except BaseException:
            status = visit.error.code if visit.error is not None else "UNKNOWN"
            raise
        finally:
            visit.leave()
            audit.record(
                door="grpc", method=method, peer=context.peer(), request_id=request_id.current.get(), status=status,
                duration_s=time.monotonic() - started_s, visit=visit,
            )  # fmt: skip

    return call


def _refusal(audit: Audit, method: str, visit: Visit | None, error: StagelineError) -> Handler:
    async def refuse(requests: Any, context: Any) -> None:
        given = dict(context.invocation_metadata() or ()).get(request_id.HEADER)
        try:
            name = check_request_id(str(given)) if given else new_request_id()
        except InvalidArgumentError:
            name = new_request_id()
        audit.record(
            door="grpc", method=method, peer=context.peer(), request_id=name, status=error.code, duration_s=0.0,
            visit=visit, error=error,
        )  # fmt: skip
        await context.abort_with_status(rpc_status.to_status(to_status(error, name)))

    return grpc.stream_stream_rpc_method_handler(refuse)  # of this kind no message is read first
