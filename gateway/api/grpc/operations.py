"""OperationsService over a Frontend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from gateway.api.service import Frontend
from stageline.operations.v1 import operations_service_pb2 as pb
from stageline.operations.v1 import operations_service_pb2_grpc as pb_grpc


class OperationsServicer(pb_grpc.OperationsServiceServicer):
    """See operations_service.proto for what each method promises."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def StreamSteps(self, request: pb.StreamStepsRequest, context: Any) -> AsyncIterator[pb.StreamStepsResponse]:
        """Groups of steps until the client cancels."""
        async with aclosing(self._frontend.engine.watch_steps()) as groups:  # type: ignore[type-var]
            async for group in groups:
                yield group
