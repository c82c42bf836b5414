"""What interceptors of the gRPC door have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

Handler = Any  # grpc.RpcMethodHandler, which the stubs describe for the synchronous server only

if TYPE_CHECKING:  # generic in the stubs, not when it runs
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Interceptor = grpc.aio.ServerInterceptor


class Around(_Interceptor):
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
        return self.wrapped(handler, details.method)

    @abstractmethod
    def wrapped(self, handler: Handler, method: str) -> Handler:
        """The handler that takes the place of this one; `method` is `/package.Service/Method`."""
