"""What it costs to move hidden states to another process of this host: our frames, beside the limits they run into.

Ways, each moving the same bytes to a receiver in another process that answers when it has them all, so a figure is a
round trip: `frames` (what stages of two hosts use: 1 MiB frames without protobuf), `shared` (what stages of one host use:
one copy into memory that both see, where the receiver computes from it), `message` (one protobuf-like gRPC message),
`socket` (a plain TCP connection), `copy` (a copy in memory, no transport at all) and, given certificates, `frames_tls`
(frames under the mutual TLS of stages).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf import wrappers_pb2

from gateway.bench.measure import Figures
from stages.server.access import OPEN, StageAccess
from stages.server.frames import Assembler, StepFrame, encode, encode_shared
from stages.server.ring import OFFER, PROOF, ReceiveRing, SendRing

OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
FRAMES, SHARED, MESSAGE = (f"/stageline.bench/{name}" for name in ("Frames", "Shared", "Message"))


async def transport(payload_bytes: int, repeats: int, tls: Mapping[str, str] | None = None) -> Figures:
    """GB/s of each way, the median of `repeats` runs taken in turn. `tls` has the fields of StageAccess.

    Raises ConfigError for certificates that cannot be used, grpc.aio.AioRpcError where they are not accepted.
    """
    access = StageAccess(**tls) if tls else OPEN
    parent, child = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=_receiver, args=(child, tls), daemon=True)
    receiver.start()
    grpc_port, tls_port, socket_port = await asyncio.to_thread(parent.recv)
    try:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", options=OPTIONS) as channel,
            access.channel(f"127.0.0.1:{tls_port}", OPTIONS) as secure,
        ):
            plain = socket.create_connection(("127.0.0.1", socket_port))
            payload: Any = np.random.default_rng(0).integers(0, 256, payload_bytes, np.uint8)
            ways = {**_ways(channel, plain, payload), "shared": await _shared_way(channel, payload)}
            if tls:
                ways["frames_tls"] = partial(_send_frames, secure, memoryview(payload))
            runs: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(repeats + 1):
                for name, way in ways.items():
                    began = time.perf_counter()
                    await way()
                    if turn:  # the first one warms up
                        runs[name].append(time.perf_counter() - began)
            plain.close()
    finally:
        receiver.kill()
        receiver.join()
    rates = {name: payload_bytes / statistics.median(times) / 1e9 for name, times in runs.items()}
    figures = {
        "payload_bytes": payload_bytes,
        "gigabytes_per_s": {name: round(rate, 3) for name, rate in rates.items()},
        "frames_to_message": round(rates["frames"] / rates["message"], 2),
        "frames_to_socket": round(rates["frames"] / rates["socket"], 2),
        "shared_to_copy": round(rates["shared"] / rates["copy"], 2),
        "runs": repeats,
    }
    if tls:
        figures["tls_to_frames"] = round(rates["frames_tls"] / rates["frames"], 2)
    return figures


async def _send_frames(channel: grpc.aio.Channel, payload: memoryview) -> None:
    stream: Any = channel.stream_unary(FRAMES, request_serializer=None, response_deserializer=None)
    call = stream()
    for part in encode(StepFrame(1, 1, b"", payload=payload)):
        await call.write(part)
    await call.done_writing()
    await call


def _ways(channel: grpc.aio.Channel, plain: socket.socket, data: Any) -> dict[str, Callable[[], Awaitable[None]]]:
    payload = memoryview(data)
    target = np.empty_like(data)
    message: Any = channel.unary_unary(
        MESSAGE, request_serializer=wrappers_pb2.BytesValue.SerializeToString, response_deserializer=None
    )

    async def one_message() -> None:
        await message(wrappers_pb2.BytesValue(value=payload.tobytes()))

    async def tcp() -> None:
        def send() -> None:
            plain.sendall(len(payload).to_bytes(8, "little"))
            plain.sendall(payload)
            assert plain.recv(1) == b"k"

        await asyncio.to_thread(send)

    async def copy() -> None:
        np.copyto(target, data)

    return {"frames": partial(_send_frames, channel, payload), "message": one_message, "socket": tcp, "copy": copy}


async def _shared_way(channel: grpc.aio.Channel, data: Any) -> Callable[[], Awaitable[None]]:
    """Raises OSError where this system has no such memory."""
    ring = SendRing(2 * len(data))
    stream: Any = channel.stream_stream(SHARED, request_serializer=None, response_deserializer=None)
    call = stream(metadata=((OFFER, ring.offer()),))
    if not ring.settle(dict(await call.initial_metadata())[PROOF]):
        raise OSError("the receiver does not see the memory that it was offered")
    frame = StepFrame(1, 1, b"", payload=memoryview(data))

    async def shared() -> None:
        position = ring.reserve(len(data))
        assert position is not None
        await asyncio.to_thread(ring.fill, position, frame.payload)
        await call.write(encode_shared(frame, position))
        assert await call.read() == b"k"

    return shared


def _receiver(ready: Connection, tls: Mapping[str, str] | None) -> None:
    asyncio.run(_receive(ready, StageAccess(**tls) if tls else OPEN))


async def _receive(ready: Connection, access: StageAccess) -> None:
    async def frames(requests: Any, context: Any) -> bytes:
        assembler, complete = Assembler(), None
        while (part := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            complete = assembler.feed(part)
        assert complete is not None
        return b"k"

    async def shared(requests: Any, context: Any) -> None:
        ring = ReceiveRing(dict(context.invocation_metadata())[OFFER])
        await context.send_initial_metadata(((PROOF, ring.proof),))
        assembler = Assembler(ring=ring)
        while (part := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            frame = assembler.feed(part)
            assert frame is not None
            assert frame.give_back is not None
            frame.give_back()
            await context.write(b"k")

    async def message(request: wrappers_pb2.BytesValue, context: Any) -> bytes:
        return b"k"

    handlers = {
        "Frames": grpc.stream_unary_rpc_method_handler(frames),
        "Shared": grpc.stream_stream_rpc_method_handler(shared),
        "Message": grpc.unary_unary_rpc_method_handler(
            message, request_deserializer=wrappers_pb2.BytesValue.FromString, response_serializer=None
        ),
    }
    server = access.server(OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("stageline.bench", handlers),))
    ports = server.add_insecure_port("127.0.0.1:0"), access.bind(server)("127.0.0.1:0")
    await server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send((*ports, listener.getsockname()[1]))
    await asyncio.to_thread(_drain_socket, listener)
    await asyncio.Event().wait()  # the parent ends this process


def _drain_socket(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    buffer = memoryview(bytearray(1 << 20))
    while size := connection.recv(8):
        left = int.from_bytes(size, "little")
        while left:
            left -= connection.recv_into(buffer[: min(left, len(buffer))])
        connection.sendall(b"k")
