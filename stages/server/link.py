"""The stream to the next stage, and the channel options every stage connection uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from stageline.errors import UnavailableError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.server.access import OPEN, StageAccess
from stages.server.frames import MAX_FRAME_BYTES, StepFrame, encode

DATA_SERVICE = "stageline.stage.v1.StageDataService"
FORWARD, RESULTS = f"/{DATA_SERVICE}/Forward", f"/{DATA_SERVICE}/Results"

# Messages are bounded by our own frames; pings find silent peers; the window covers a few frames in flight.
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC measures bandwidth with pings of its own; while one is out it sends no keepalive, and waits for it 60 s by default.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.lookahead_bytes", 8 << 20),
)


def epoch_metadata(epoch: int, incarnation: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a data stream."""
    return (("stageline-epoch", str(epoch)), ("stageline-incarnation", incarnation))


class Link:
    """A Forward stream to one stage under one epoch."""

    def __init__(
        self,
        address: str,
        epoch: int,
        incarnation: str,
        publish: Callable[[pb.WatchResponse], None],
        access: StageAccess = OPEN,
    ) -> None:
        """`publish` gets LinkBroken once, when the stream ends without `close`."""
        self.address = address
        self._metadata, self._publish = epoch_metadata(epoch, incarnation) + access.metadata(), publish
        self._channel = access.channel(address, OPTIONS)
        self._call: grpc.aio.StreamUnaryCall[bytes, bytes] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def open(self, timeout_s: float = 10.0) -> None:
        """Raises UnavailableError where nobody answers in time."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError:
            await self._channel.close(None)
            raise UnavailableError(
                "NEXT_STAGE_UNREACHABLE",
                f"no stage answers at {self.address} within {timeout_s} s",
                address=self.address,
            ) from None
        method: Any = self._channel.stream_unary(FORWARD, request_serializer=None, response_deserializer=None)
        self._call = method(metadata=self._metadata)
        self._watcher = asyncio.create_task(self._watch(self._call))

    async def _watch(self, call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> None:
        code, details = await call.code(), await call.details()
        broken = pb.LinkBroken(address=self.address, detail=f"{code.name}: {details}")
        self._publish(pb.WatchResponse(link_broken=broken))

    async def send(self, frame: StepFrame) -> None:
        """Write one step; waits for flow control. That the stream ended is published, not raised here."""
        assert self._call is not None
        try:
            for message in encode(frame):
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # the stream has ended; its watcher says why

    async def close(self) -> None:
        """End the stream quietly."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)
