"""A peer that hangs in the middle of a message is noticed, on stage ports and at the public door.

gRPC then has a ping of its own out (it measures bandwidth while data comes), and sends no keepalive until that one has come
back or timed out. The servers' times are divided by ten here; without a timeout of that ping they would wait for 60 s.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
from doors_helpers import Doors
from stage_server_helpers import FIRST, running

import gateway.api.grpc.server
import stages.server.server
from gateway.api.grpc.server import serve_grpc
from stages.server.link import FORWARD

SPEED = 10
MESSAGE_BYTES = 1 << 20
NOTICED_S = 8.0


def faster(options):
    times = {"grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"}
    return tuple((name, value // SPEED if name in times else value) for name, value in options)


class Wire:
    """A TCP relay that from the middle of the first message on delivers nothing more of the client's."""

    def __init__(self, port: int, pass_bytes: int) -> None:
        self._port, self._left = port, pass_bytes
        self.silent, self.server_left = asyncio.Event(), asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)

        async def down() -> None:
            while data := await from_server.read(65536):
                writer.write(data)
            self.server_left.set()

        back = asyncio.create_task(down())
        while data := await reader.read(16384):
            if self._left > 0:
                to_server.write(data)
                self._left -= len(data)
            else:
                self.silent.set()
        to_server.close()
        writer.close()
        await back


@asynccontextmanager
async def wire(port: int):
    relay = Wire(port, MESSAGE_BYTES // 2)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as channel:
        yield relay, channel
    server.close()
    await server.wait_closed()


async def left(relay: Wire, call) -> None:
    await asyncio.wait_for(relay.silent.wait(), 10)
    assert not relay.server_left.is_set()
    await asyncio.wait_for(relay.server_left.wait(), NOTICED_S)
    call.cancel()


async def test_a_stage_leaves_a_neighbour_that_hangs(monkeypatch):
    monkeypatch.setattr(stages.server.server, "OPTIONS", faster(stages.server.server.OPTIONS))
    async with running(FIRST) as stage, wire(int(stage.address.rpartition(":")[2])) as (relay, channel):
        call = channel.stream_unary(FORWARD)()
        writing = asyncio.ensure_future(call.write(bytes(MESSAGE_BYTES)))
        await left(relay, call)
        await asyncio.gather(writing, return_exceptions=True)


async def test_the_door_leaves_a_client_that_hangs(monkeypatch):
    monkeypatch.setattr(gateway.api.grpc.server, "OPTIONS", faster(gateway.api.grpc.server.OPTIONS))
    server = await serve_grpc(Doors().frontend, "127.0.0.1", 0)
    try:
        async with wire(server.port) as (relay, channel):
            call = channel.unary_unary("/stageline.inference.v1.InferenceService/Generate")(bytes(MESSAGE_BYTES))
            await left(relay, call)
            await asyncio.gather(call, return_exceptions=True)
    finally:
        await server.stop(0)
