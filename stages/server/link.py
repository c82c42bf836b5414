"""The stream to the next stage, and the channel options every stage connection uses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc

from stageline.errors import UnavailableError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.server.access import OPEN, StageAccess
from stages.server.frames import MAX_FRAME_BYTES, StepFrame, encode, encode_shared
from stages.server.ring import OFFER, PROOF, SendRing, offered

_LOG = logging.getLogger(__name__)

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


COPY_ON_THREAD_BYTES = 256 << 10  # a shorter copy costs the event loop less than handing it to a thread


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
        shared_memory_bytes: int = 0,
    ) -> None:
        """`publish` gets LinkBroken once, when the stream ends without `close`. A ring of `shared_memory_bytes` is offered
        to the stage; 0 offers none."""
        self.address = address
        self._metadata, self._publish = epoch_metadata(epoch, incarnation) + access.metadata(), publish
        self._channel = access.channel(address, OPTIONS)
        self._call: grpc.aio.StreamUnaryCall[bytes, bytes] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._shared_memory_bytes = shared_memory_bytes
        self._ring: SendRing | None = None

    @property
    def shares_memory(self) -> bool:
        """Whether payloads go through a ring while there is room in it."""
        return self._ring is not None

    async def open(self, timeout_s: float = 10.0) -> None:
        """Raises UnavailableError where nobody answers in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
                await self._begin()
        except TimeoutError:
            await self.close()
            raise UnavailableError(
                "NEXT_STAGE_UNREACHABLE",
                f"no stage answers at {self.address} within {timeout_s} s",
                address=self.address,
            ) from None

    async def _begin(self) -> None:
        """Begin the stream, and where a ring is offered wait for what the stage says to it."""
        ring = offered(self._shared_memory_bytes)
        try:
            offer = () if ring is None else ((OFFER, ring.offer()),)
            method: Any = self._channel.stream_unary(FORWARD, request_serializer=None, response_deserializer=None)
            self._call = method(metadata=(*self._metadata, *offer))
            self._watcher = asyncio.create_task(self._watch(self._call))
            if ring is None:
                return
            # Empty where the stage refuses the stream: the watcher says why.
            proof = dict(await self._call.initial_metadata() or ()).get(PROOF, "")
            if ring.settle(proof):
                self._ring = ring
            _LOG.info("hidden states to %s go %s", self.address, "through shared memory" if self._ring else "in frames")
        finally:
            if ring is not None and self._ring is None:
                ring.close()

    async def _watch(self, call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> None:
        code, details = await call.code(), await call.details()
        broken = pb.LinkBroken(address=self.address, detail=f"{code.name}: {details}")
        self._publish(pb.WatchResponse(link_broken=broken))

    async def send(self, frame: StepFrame) -> None:
        """Write one step; waits for flow control. That the stream ended is published, not raised here."""
        assert self._call is not None
        try:
            position = None
            if self._ring is not None and len(frame.payload):
                position = await self._share(self._ring, frame)
            for message in encode(frame) if position is None else (encode_shared(frame, position),):
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass  # the stream has ended; its watcher says why

    async def _share(self, ring: SendRing, frame: StepFrame) -> int | None:
        """Copy the payload into the ring; None where it has no room, so that nothing ever waits for room."""
        position = ring.reserve(len(frame.payload))
        if position is not None:
            if len(frame.payload) < COPY_ON_THREAD_BYTES:
                ring.fill(position, frame.payload)
            else:
                await asyncio.to_thread(ring.fill, position, frame.payload)
        return position

    async def close(self) -> None:
        """End the stream quietly."""
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._call is not None:
            self._call.cancel()
        await self._channel.close(None)
